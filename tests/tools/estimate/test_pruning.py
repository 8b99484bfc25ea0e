"""What a small layer holds says what a large one holds; a few rows say how long all of them take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from billhook_kernels import preconditioner
from tools.estimate import pruning as module
from tools.estimate.meter import Meter
from tools.estimate.pruning import (
    count_flops,
    count_layer,
    make_statistics,
    make_weight,
    time_preparation,
    time_rows,
)
from tools.plans.methods import LEVERS, METHODS
from tools.plans.recipe import Recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("form", "rounded"), [((256, 256), False), ((512, 128), False), ((128, 512), False), ((128, 512), True)]
)
def test_pruning_a_layer_holds_what_was_counted(
    form: tuple[int, int], rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bf16 is multiplied, wide layers, and not the small ones that are counted, hold a little less."""
    monkeypatch.setattr(preconditioner, "multiplies_bf16", lambda _device: rounded)
    said = count_layer([form, (16, 16)], torch.float32, METHODS)
    weight_OI, statistics = make_weight(form, torch.float32), make_statistics(form[1])
    recipes = [Recipe(method=name, refit=refit) for name in METHODS for refit in (False, True)]
    pruned = {recipe.mask_label: module._meter(module._prune, recipe, weight_OI, statistics).peak for recipe in recipes}
    levels = {recipe.mask_label: module._meter(module._cut, recipe, weight_OI, statistics).peak for recipe in recipes}
    least = 0.9 if rounded else 0.95
    assert least * said.pruned <= max(pruned.values()) <= 1.05 * said.pruned
    assert least * said.levels <= max(levels.values()) <= 1.05 * said.levels
    assert module._meter_curve(weight_OI, statistics).peak == pytest.approx(said.curve, rel=0.05)


def test_of_a_wide_layer_a_second_moment_and_what_it_is_factored_to_are_held_once() -> None:
    """A damped fit holds no damped moment beside its system, a factor neither what it was made from nor its inverse."""
    weight_OI, statistics = make_weight((16, 512), torch.float32), make_statistics(512)
    matrix = statistics.moment_II.nbytes

    def peak(recipe: Recipe, *, levels: bool = False) -> float:
        return module._meter(module._cut if levels else module._prune, recipe, weight_OI, statistics).peak / matrix

    for levels in (False, True):
        plain, damped = (peak(Recipe(damping=share), levels=levels) for share in (0.0, 0.2))
        assert damped < max(plain, 2.6), "a damped moment is there while its system is made"
    assert peak(Recipe(method="sparsegpt")) < 3.5
    with Meter() as meter:
        system = statistics.system
    assert system is not None and meter.peak < 1.6 * matrix


def test_an_opponent_counts_where_it_is_asked_for() -> None:
    planned, asked = (count_layer([(64, 64)], torch.float32, methods) for methods in (LEVERS, [*LEVERS, "alps"]))
    assert count_layer([(64, 64)], torch.float32) == planned
    assert asked.pruned > planned.pruned and asked.curve == planned.curve


def test_the_worst_of_the_forms_counts() -> None:
    wide, tall = count_layer([(64, 128)], torch.float32), count_layer([(192, 64)], torch.float32)
    both = count_layer([(64, 128), (192, 64), (16, 16)], torch.float32)
    assert both == tuple(max(pair) for pair in zip(wide, tall, strict=True))


def test_products_grow_with_outputs_and_the_square_of_inputs() -> None:
    product = 2 * 128 * 128**2
    assert 13 < count_flops(Recipe(), (128, 128)) / product < 20  # 13 products, and what prepares them
    for recipe, part in ((Recipe(), 0.15), (Recipe(refit_steps=10), 0.15), (Recipe(method="sparsegpt"), 0.3)):
        weight_OI, statistics = make_weight((384, 256), torch.float32), make_statistics(256)
        real = module._meter(module._prune, recipe, weight_OI, statistics).flops
        assert count_flops(recipe, (384, 256)) == pytest.approx(real, rel=part)
    assert count_flops(Recipe(method="wanda", refit=False), (128, 128)) == 0
    assert count_flops(Recipe(pattern="2:4"), (500, 300)) > 0
    assert count_flops(Recipe(), (128, 128), levels=True) > count_flops(Recipe(), (128, 128))


# --- seconds ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is pruned; a layer takes half a second, and a hundredth more for each of its rows, which are noted."""
    seen: list[int] = []

    def take(_device: torch.device, call: Callable[[], Any]) -> float:
        call()
        return 0.5 + seen[-1] / 100

    def prune(_recipe: Recipe, weight_OI: torch.Tensor, _statistics: Any) -> None:
        seen.append(len(weight_OI))

    monkeypatch.setattr(module, "time_call", take)
    monkeypatch.setattr(module, "_prune", prune)
    monkeypatch.setattr(module, "_cut", prune)
    return seen


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize(("allowance", "run"), [(100.0, [64, 1000]), (1.0, [64, 32])])
def test_all_rows_are_pruned_where_there_is_time(
    rows: list[int], levels: bool, allowance: float, run: list[int]
) -> None:
    seconds = time_rows(Recipe(), (1000, 16), make_statistics(16), torch.float32, allowance, levels=levels)
    assert (seconds, rows) == (pytest.approx(10.5), run)


def test_a_layer_of_few_rows_is_pruned_whole(rows: list[int]) -> None:
    assert time_rows(Recipe(), (8, 16), make_statistics(16), torch.float32, 1.0, levels=False) == pytest.approx(0.58)
    assert rows == [8, 8]


@pytest.mark.parametrize(
    ("recipe", "seconds"),
    [
        (Recipe(method="wanda", refit=False), 0.0),
        (Recipe(method="refit"), 1.0),
        (Recipe(method="sparsegpt", refit=False), 8.0),  # twice as wide as what is factored
        (Recipe(method="sparsegpt", refit=True), 9.0),
        (Recipe(method="alps", refit=False), 8.0),
    ],
)
def test_what_layers_share_is_prepared_once(
    recipe: Recipe, seconds: float, a_second_each: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FACTORED", 32)
    statistics = make_statistics(64)
    assert time_preparation(recipe, statistics) == seconds
    took = len(a_second_each)
    module._prune(recipe, make_weight((16, 64), torch.float32), statistics)
    assert len(a_second_each) == took
