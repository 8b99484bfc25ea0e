"""What is done how often, and what it comes to at given prices."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_settings
from tests.tools.estimate.test_block import make_empty
from tools.estimate import course as module
from tools.estimate.block import Counts
from tools.estimate.clock import Fit
from tools.estimate.course import Course
from tools.estimate.phases import ASKED_FOR, cut_parts, find_busiest
from tools.estimate.prices import Pricing, Work, price_flops, price_seconds
from tools.estimate.timing import Steps, Times
from tools.estimate.work import find_shares, list_work
from tools.models.layers import find_layers
from tools.plans.mix import mix_questions
from tools.plans.recipe import Recipe

MASKS = Recipe(method="two-sided", refit=False)
STRONG = Recipe(curves="mask")
COURSE = Course(
    rounds=[MASKS, STRONG, STRONG, STRONG.model_copy(update={"statistics": "sequential"})],
    baselines=[Recipe(method="wanda", refit=False, allocation="uniform")],
    profiles=2,
    tests=3,
    prompts=4,
    continuing=2,
)
STEPS = Steps(
    forward=2.0,
    statistics=5.0,
    gradients=7.0,
    curves=Fit(11.0, 13.0),
    loss=0.25,
    divergence=0.5,
    describe=17.0,
    word=0.125,
    write=0.75,
)
TIMES = Times(
    steps=STEPS,
    prune={"two-sided": 100.0, "refit": 1000.0, "wanda": 50.0, "sparsegpt+refit": 500.0},
    cut={"refit": 3000.0, "sparsegpt+refit": 2000.0},
    write=0.5,
    read=0.25,
    moments=8,
    tokens=64,
)


def work_of(settings: Any, course: Course = COURSE, workers: int = 0, **ways: Any) -> list[Work]:
    """At the prices above; a product costs what its name says."""
    layers = find_layers(make_empty("llama"))
    shares = find_shares(settings, layers, find_busiest(cut_parts(settings, workers)))
    flops = {"forward": 3.0, "moments": 5.0, "loss": 1.0, "write": 4.0, "prune refit": 7.0}
    return list_work(settings, 14, shares, course, Pricing(flops, price_seconds(TIMES)), **ways)


def test_every_step_is_done_so_often_and_takes_so_long(tiny_llama: Path) -> None:
    """4 calibration windows, 2 of them with gradients, 3 validation windows and 2 of test text."""
    found = work_of(tiny_settings(tiny_llama))
    assert [(work.name, work.times, work.seconds) for work in found] == [
        ("validate the dense model", 1, 3 * 2.25),
        ("profile, statistics", 2, 4 * 2),
        ("profile, second moments", 1, 4 * 3 + 8 * 0.5),
        ("profile, gradients", 2, 2 * 7),
        ("profile, scores and KL curves", 2, 11 + 2 * 13 + 17),
        (ASKED_FOR, 0, 2 * 2 + 2 * 7 + 2 * 13 + 3000),
        ("prune", 1, 100),
        ("prune", 2, 1000 + 2),
        ("prune", 1, 1000 + 2 + 2 * 4 * 2 + 4 * 3),
        ("prune", 1, 50 + 2 * 4 * 2),
        ("validate", 4, 3 * 2.5),
        ("test", 3, 2 * 2.25),
        ("go on with prompts", 1, 80 * 0.125),
    ]
    streamed = work_of(tiny_settings(tiny_llama), streamed=True)[-1]
    assert streamed.how == "20 forwards of a token of each of 4 prompts"
    assert [work.how for work in found if work.name == "prune"] == [
        "14 layers by two-sided",
        "14 layers by refit",
        "14 layers by refit~sequential, with two more forwards of the calibration text",
        "14 layers by wanda, with two more forwards of the calibration text",
    ]
    assert [work.flops for work in found[:3]] == [3 * (3 + 1), 4 * 3, 4 * 5]
    assert [work.flops for work in found if work.name == "prune"] == [0, 7, 7 + 2 * 4 * 3 + 4 * 5, 2 * 4 * 3]


def test_second_moments_that_are_not_kept_cost_a_forward_of_every_round_that_needs_them(tiny_llama: Path) -> None:
    """And on the way down as many as it takes to set out anew."""
    course = COURSE._replace(rounds=[Recipe(), MASKS, STRONG])
    kept, anew = (work_of(tiny_settings(tiny_llama), course, setting_out=out) for out in (0, 2.5))
    changed = [(x.name, y.seconds - x.seconds, y.passes - x.passes) for x, y in zip(kept, anew, strict=True) if x != y]
    forward, moments = 4 * 2, 4 * 3
    assert changed == [
        ("profile, second moments", -8 * 0.5, 0),
        (ASKED_FOR, 2.5 * forward + moments + 8 * 0.5 + 2, 3),
        ("prune", forward + moments + 8 * 0.5, 1),
    ]
    hows = [work.how for work in anew if work.name in (ASKED_FOR, "prune")]
    assert hows[0].endswith(" to 5 levels, with 2.5 forwards of the calibration text")
    assert hows[1] == "14 layers by refit, with one more forward of the calibration text"


def test_further_windows_are_measured_by_the_dense_model_by_every_round_and_by_finalists(tiny_llama: Path) -> None:
    found = work_of(tiny_settings(tiny_llama, further_windows=5), COURSE._replace(finalists=3))
    steps = {work.name: (work.times, work.seconds) for work in found}
    assert steps["validate the dense model"] == (1, (3 + 2 * 5) * 2.25)
    assert steps["compare at the target, at most"] == (4 + 3, 5 * 2.5)
    assert steps["validate"] == (4, 3 * 2.5)


def test_a_kept_plan_by_other_weights_is_pruned_and_validated_as_a_round_is(tiny_llama: Path) -> None:
    found = work_of(tiny_settings(tiny_llama), COURSE._replace(reweighted=[STRONG, STRONG]))
    plain = work_of(tiny_settings(tiny_llama))
    times = [{(work.name, work.how): work.times for work in works} for works in (found, plain)]
    more = {key: often - times[1][key] for key, often in times[0].items() if often != times[1][key]}
    assert [name for name, _ in more] == ["prune", "validate"] and set(more.values()) == {2}


def test_without_prices_in_seconds_there_are_none(tiny_llama: Path) -> None:
    settings = tiny_settings(tiny_llama)
    shares = find_shares(settings, find_layers(make_empty("llama")), cut_parts(settings, 0)[0])
    assert {work.seconds for work in list_work(settings, 14, shares, COURSE, Pricing({"forward": 1.0}, None))} == {None}


def test_curves_that_rounds_ask_for_are_counted_once_for_each_method(tiny_llama: Path) -> None:
    own = [Recipe(), Recipe(strength=0.8), Recipe(method="sparsegpt"), MASKS]
    course = Course(rounds=own)
    assert [recipe.mask_label for recipe in course.curves] == ["refit", "sparsegpt+refit"]
    asked = [work for work in work_of(tiny_settings(tiny_llama), COURSE._replace(rounds=own)) if work.name == ASKED_FOR]
    assert [(work.times, work.seconds) for work in asked] == [(1, 44 + 3000), (1, 44 + 2000)]


def test_questions_are_profiled_too_where_a_plan_mixes_them_in(tiny_llama: Path) -> None:
    mixed, half = (STRONG.model_copy(update={"mix": mix_questions(share)}) for share in (0.25, 0.5))
    settings = tiny_settings(tiny_llama, questions="hub:org/q:train")
    found = work_of(settings, COURSE._replace(rounds=[MASKS, mixed, half]))
    assert {work.name: work.times for work in found[1:5]} == {
        "profile, statistics": 3,
        "profile, second moments": 2,
        "profile, gradients": 3,
        "profile, scores and KL curves": 3,
    }


def test_questions_are_work(tiny_llama: Path) -> None:
    settings = tiny_settings(tiny_llama, questions="hub:org/questions:train", question_pairs=5)
    (asked,) = [work for work in work_of(settings) if work.name == "ask questions"]
    assert asked.how == "forward of 5 questions of about 30 tokens with their answers"
    assert (asked.times, asked.seconds) == (1 + 4 + 3, 5 * 30 / 64 * 2)


def test_text_that_the_model_writes_is_work_of_one_process(tiny_llama: Path) -> None:
    settings = tiny_settings(tiny_llama, calibration="self", validation="self:A", further_windows=1)
    found = work_of(settings, workers=2)[:4]
    assert [(work.name, work.times, work.seconds, work.share) for work in found[:3]] == [
        ("write calibration text", 1, 4 * 0.75, 1),
        ("write validation text", 1, 3 * 0.75, 1),
        ("write further text", 1, 2 * 0.75, 1),
    ]
    assert found[0].how == "256 tokens one by one, 16 documents at once; more where some end early"
    assert found[0].flops == 4 * 4.0 and found[3].name == "validate the dense model"


def test_products_are_priced_by_the_code_that_multiplies() -> None:
    layers = find_layers(make_empty("llama"))
    counts = Counts(0, 0, 0, 0, forward=10.0, backward=7.0, head=3.0)
    prices = price_flops(tiny_settings("unused"), layers, counts, COURSE)
    assert prices == {
        "forward": 10,
        "moments": 2 * 64 * 2 * (6 * 32 * 32 + 48 * 48),
        "gradients": 10 + 3 + 2 * (7 + 3),
        "curves": 2 * 64 * 15_360 * 6,
        "loss": 3,
        "divergence": 6,
        "write": 13,
        "prune two-sided": 0,
        "prune refit": prices["prune refit"],
        "prune wanda": 0,
        "cut refit": prices["cut refit"],
    }
    refit = 2 * 2 * ((32 + 16 + 16 + 32 + 48 + 48) * 32 * 32 + 32 * 48 * 48)
    assert 13 * refit < prices["prune refit"] < 20 * refit


# --- workers -----------------------------------------------------------------------------------------------------


def test_the_busiest_worker_says_how_long_it_takes(tiny_llama: Path) -> None:
    def find(workers: int) -> list[Work]:
        settings = tiny_settings(
            tiny_llama, workers=str(workers or ""), calibration_windows=16, questions="hub:org/q:train"
        )
        return work_of(settings, workers=workers)

    alone, shared = find(0), find(3)
    assert {work.share for work in alone} == {1.0}
    assert [work.seconds for work in shared] == [work.seconds for work in alone]
    most = 32 * 48 * 48 / (2 * ((32 + 16 + 16 + 32 + 48 + 48) * 32 * 32 + 32 * 48 * 48))  # one down_proj
    layers = pytest.approx(1 / 3 + 2 / 3 * most)
    assert {work.name: work.share for work in shared} == {
        "validate the dense model": 1 / 3,
        **dict.fromkeys(["profile, statistics", "profile, second moments"], 6 / 16),  # 3 of 8 shards
        **dict.fromkeys(["profile, gradients", "profile, scores and KL curves"], 1 / 2),  # 1 of 2 windows
        ASKED_FOR: 1 / 2,
        "prune": layers,
        "validate": 1 / 3,
        "ask questions": 1 / 3,
        "test": 1 / 2,
        "own answers, at most": 1,
        "go on with prompts": 1,
    }
    many = find(20)  # no more than the shards
    assert (many[1].share, many[3].share, many[0].share) == (1 / 8, 1 / 2, 1 / 3)


def test_names_of_what_is_done_inside_a_layer_leave_out_whence_its_statistics_are() -> None:
    recipe = Recipe(refit_steps=3, gamma="clipped", mix=mix_questions(0.5), statistics="sequential")
    assert module.name_recipe(recipe) == "refit3"
    assert module.name_recipe(Recipe(pattern="2:4")) == "refit to 2:4"
    assert module.name_recipe(Recipe(method="wanda", refit=False)) == "wanda"
