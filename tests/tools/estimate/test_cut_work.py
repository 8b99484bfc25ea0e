"""What runs that take parts away do how often, and what one block of each kind tells of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_settings
from tests.tools.estimate.test_block import make_empty
from tests.tools.estimate.test_cutting import UNIFORM, plan
from tools.estimate.block import Counts
from tools.estimate.course import Course, CutCourse
from tools.estimate.cut_work import SPEED, TRIED, list_cut_end, list_cut_work, price_cut_flops, price_cut_seconds
from tools.estimate.cutting import CHOOSE, CURVES, CUT, SEARCH, TIME, find_cutting
from tools.estimate.needs import estimate
from tools.estimate.prices import Pricing
from tools.estimate.units import count_elimination, count_fit
from tools.models.layers import find_layers

CPU = torch.device("cpu")
SECONDS = {"forward": 2.0, "divergence": 0.5, "word": 0.125}
SECONDS |= {"walk down": 3.0, "begin": 0.25, "walk and sum": 2.5, "choose": 100.0, "fit": 1000.0}


def steps_of(size: float, **changes: int) -> dict[str, tuple[int, float | None]]:
    """How often, and seconds, at the prices above; one operation of each costs as much."""
    model = make_empty("llama", num_hidden_layers=6)
    cutting, pricing = find_cutting(model, find_layers(model), CutCourse(3, size, 8)), Pricing(SECONDS, SECONDS)
    work = [*list_cut_work(tiny_settings("unused", **changes), cutting, pricing), *list_cut_end(pricing)]
    assert [step.flops for step in work] == [step.seconds for step in work]
    return {step.name: (step.times, step.seconds) for step in work}


def test_every_step_is_done_so_often_and_takes_so_long() -> None:
    """4 calibration windows of 64 tokens, fewer than blocks are searched on; up to 2 of 6 blocks go."""
    assert steps_of(0.75) == {
        CURVES: (1, 4 * (2 + 0.25 + 3)),
        CHOOSE: (1, 100),
        SEARCH: (1, 4 * (2 * 2 + 3.5 * 2 + 6 * 0.5)),
        f"{SEARCH}, each further one": (1, 4 * (2 + TRIED * (3.5 * 2 + 6 * 0.5))),
        CUT: (3, 4 * (2.5 + 3 * 2) + 1000),
        SPEED: (1, 2 * 6 * (2 + 33 * 0.125)),
    }


def test_only_so_much_text_is_searched_on() -> None:
    few, many = (steps_of(0.75, calibration_windows=count)[SEARCH] for count in (16, 32))
    assert few == many == (1, 16 * (2 * 2 + 3.5 * 2 + 6 * 0.5))


def test_a_speed_is_measured_first_by_three_shapes_and_one() -> None:
    found = steps_of(0)
    assert next(iter(found)) == TIME and found[TIME] == (1, (4 + 2) * 6 * (2 + 33 * 0.125))
    assert found[f"{SEARCH}, each further one"][0] == 4, "all blocks but one may go"


def test_where_no_block_may_go_none_is_searched() -> None:
    assert SEARCH not in steps_of(0.9)


def test_nothing_else_is_done_than_runs_of_zeros_do(tiny_llama: Path, untimed: None) -> None:
    zeros = estimate(tiny_settings(tiny_llama), Course([UNIFORM] * 2, tests=3, prompts=4, continuing=2), target=0.45)
    found = estimate(tiny_settings(tiny_llama), plan(0.6), target=0.45)
    of_cuts = [CURVES, CHOOSE, SEARCH, CUT, SPEED]
    names = ["validate the dense model", *of_cuts[:-1], "prune", "validate", "test", "go on with prompts", SPEED]
    assert [step.name for step in found.work] == names
    same = {step.name: step for step in zeros.work if step.name != "prune"}
    for step in found.work:
        assert step.name in (*of_cuts, "prune") or step == same[step.name]


def test_products_are_priced_by_the_code_that_multiplies() -> None:
    model, settings = make_empty("llama"), tiny_settings("unused")
    cutting = find_cutting(model, find_layers(model), CutCourse(1, 0.6, 8))
    counts = Counts(0, 0, 0, 0, forward=10.0, backward=7.0, head=3.0)
    prices = price_cut_flops(settings, counts, cutting)
    heads, neurons = cutting.forms
    assert prices == {
        "walk down": 10 + 7 + 2 * 64 * 2 * (2 * 32**2 + 48**2 + 32**2),
        "begin": 2 * 3,
        "walk and sum": 10 + 2 * 64 * 2 * (32**2 + 48**2),
        "choose": 2 * sum(count_elimination(form, torch.float32).flops for form in (heads, neurons)),
        "fit": 2 * sum(count_fit(form, torch.float32).flops for form in (heads, neurons)),
    }
    assert all(price > 0 for price in prices.values())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"num_hidden_layers": 4}),
        ("gemma3", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", *["full_attention"] * 3]}),
        ("opt", {"num_hidden_layers": 4}),
        ("gpt2", {"n_layer": 4}),
    ],
)
def test_one_block_of_each_kind_stands_for_all(
    architecture: str, changes: dict[str, Any], a_second_each: list[str]
) -> None:
    model = make_empty(architecture, **changes)
    cutting = find_cutting(model, find_layers(model), CutCourse(1, 0.7, 8))
    found, parts = price_cut_seconds(model, 64, CPU, cutting), len(cutting.forms)
    assert found == {"walk down": 4, "begin": 1, "walk and sum": 4, "choose": 4 * parts, "fit": 4 * parts}


def test_seconds_of_all_steps_are_there_where_one_block_is_really_run(tiny_llama: Path) -> None:
    found = estimate(tiny_settings(tiny_llama), plan(0.6), target=0.45)
    assert (found.untimed, found.tokens) == ("", 64)
    assert all(step.seconds is not None and step.seconds > 0 for step in found.work)
