"""What a plan may and may not ask for."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from kernels.methods import METHODS
from tools.recipes import Adjustment, Recipe


def test_every_method_is_a_kernel_and_the_other_way_round() -> None:
    assert set(get_args(Recipe.model_fields["method"].annotation)) == set(METHODS)


@pytest.mark.parametrize(
    ("recipe", "mask", "label"),
    [
        (Recipe(), "two-sided+refit", "two-sided+refit:kappa"),
        (Recipe(strength=0.8), "two-sided+refit", "two-sided+refit:kappa@0.8"),
        (Recipe(method="wanda", refit=False, allocation="uniform"), "wanda", "wanda:uniform"),
        (Recipe(method="refit"), "refit", "refit:kappa"),
        (Recipe(method="sparsegpt"), "sparsegpt+refit", "sparsegpt+refit:kappa"),
        (Recipe(allocation="uniform", strength=0.5), "two-sided+refit", "two-sided+refit:uniform"),
    ],
)
def test_labels(recipe: Recipe, mask: str, label: str) -> None:
    assert (recipe.mask_label, recipe.label) == (mask, label)


def test_the_method_refit_is_not_refitted_once_more() -> None:
    assert not Recipe(method="refit").refits_after
    assert Recipe(method="refit", refit=False).refits
    assert Recipe(method="wanda").refits_after
    assert not Recipe(method="wanda", refit=False).refits


def test_a_recipe_is_a_value() -> None:
    assert Recipe() == Recipe(method="two-sided") and hash(Recipe()) == hash(Recipe())
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().strength = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"strength": 1.01}, "less than or equal to 1"),
        ({"strength": -0.1}, "greater than or equal to 0"),
        ({"strength": float("nan")}, "strength"),
        ({"method": "random"}, "'two-sided-obs' or 'refit'"),
        ({"allocation": "owl"}, "'kappa' or 'uniform'"),
        ({"gamma_clip": 10}, "Extra inputs are not permitted"),
    ],
)
def test_recipes_that_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Recipe.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "factor", "factor": 2},
        {"action": "bounds", "low": 0.1},
        {"action": "bounds", "high": 0.1},
        {"action": "bounds", "low": 0.1, "high": 0.1, "reason": "x" * 500},
        {"action": "protect"},
    ],
)
def test_adjustments_that_make_sense(fields: dict[str, Any]) -> None:
    Adjustment.model_validate({"selector": "*", **fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"action": "factor"}, "action 'factor' needs a factor"),
        ({"action": "factor", "low": 0.3}, "action 'factor' needs a factor"),
        ({"action": "bounds", "factor": 2}, "action 'bounds' needs low or high"),
        ({"action": "bounds", "low": 0.6, "high": 0.5}, "low 0.6 is above high 0.5"),
        ({"action": "bounds", "high": 45}, "less than or equal to 1"),
        ({"action": "factor", "factor": 0}, "greater than or equal to 0.05"),
        ({"action": "factor", "factor": float("nan")}, "factor"),
        ({"action": "factor", "factor": float("inf")}, "less than or equal to 20"),
        ({"action": "drop"}, "'factor', 'bounds' or 'protect'"),
        ({"action": "protect", "selector": ""}, "at least 1 character"),
        ({"action": "protect", "selector": "x" * 201}, "at most 200 characters"),
        ({"action": "protect", "reason": "x" * 501}, "at most 500 characters"),
        ({"action": "protect", "strength": 1}, "Extra inputs are not permitted"),
    ],
)
def test_adjustments_that_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Adjustment.model_validate({"selector": "*", **fields})
