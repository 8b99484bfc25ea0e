"""What a plan does otherwise than the kept one, in words, and what that did to KL."""

from typing import Any

import pytest

from graph.planning.orders import describe_plan
from graph.planning.plan import Plan
from graph.reflecting.rule import name_levers, note_tried
from graph.reflecting.schema import Tried
from tests.situations import make_trial
from tools.plans.recipe import Recipe
from tools.results.trial import Trial

REFIT = Recipe(curves="mask")
TILT = {"adjustments": [{"selector": "blocks 0-3 · *.v_proj", "action": "factor", "factor": 2}]}


def carry_out(recipe: Recipe, **plan: Any) -> Trial:
    line = describe_plan(Plan.model_validate({"sparsity": 0.45, "recipe": recipe, **plan}))
    return make_trial(1, "accept", 0.45, recipe).model_copy(update={"plan": line})


@pytest.mark.parametrize(
    ("changes", "plan", "levers"),
    [
        ({"gamma": "clipped"}, {}, "refit: gamma clipped for plain"),
        ({"refit_steps": 10, "strength": 0.8}, {}, "refit: refit_steps 10 for 5, strength 0.8 for 1"),
        ({"damping": 0.3}, {}, "refit: damping 0.3 for 0"),
        ({"method": "wanda", "refit": False, "damping": 0.3}, {}, "wanda: method wanda for refit, refit no for yes"),
        ({"method": "wanda", "refit": False}, {}, "wanda: method wanda for refit, refit no for yes"),
        ({"mix": {"code": 0.75, "prose": 0.25}}, {}, "refit: mix 0.75 code 0.25 prose for as in the run"),
        ({}, TILT, "refit: with blocks 0-3 · *.v_proj x2"),
        ({}, {"multipliers": {"*.q_proj": 1.5}}, "refit: other factors of lessons"),
        ({"curves": "method"}, {"multipliers": {"*.q_proj": 1.5}}, "refit: curves method for mask"),
        ({}, {}, ""),
    ],
)
def test_levers_are_named_beside_the_kept_plans(changes: dict[str, Any], plan: dict[str, Any], levers: str) -> None:
    trial = carry_out(REFIT.model_validate(REFIT.model_dump() | changes), **plan)
    assert name_levers(trial, carry_out(REFIT)) == levers


def test_what_a_plan_leaves_out_is_named_and_long_names_are_cut() -> None:
    assert name_levers(carry_out(REFIT), carry_out(REFIT, **TILT)) == "refit: without blocks 0-3 · *.v_proj x2"
    many = [{"selector": c * 40, "action": "protect"} for c in "abcd"]
    assert len(name_levers(carry_out(REFIT, adjustments=many), carry_out(REFIT))) == 160
    assert name_levers(carry_out(REFIT), carry_out(REFIT).model_copy(update={"recipe": None})) == ""


def test_a_change_is_relative_and_paired() -> None:
    before = carry_out(REFIT).model_copy(update={"kl": 0.2})
    trial = carry_out(Recipe(gamma="clipped", curves="mask")).model_copy(
        update={"iteration": 2, "kl": 0.19, "change_error": 0.004}
    )
    noted = note_tried("r", trial, before, "")
    assert noted is not None and (noted.change, noted.error) == (pytest.approx(-0.05), pytest.approx(0.02))
    assert noted == Tried(
        **{"run": "r", "iteration": 2, "levers": "refit: gamma clipped for plain", "sparsity": 0.45, "pattern": ""},
        **{"change": noted.change, "error": noted.error},
    )
    for other in ({"kl": None}, {"change_error": None}, {"sparsity": 0.3}):
        assert note_tried("r", trial.model_copy(update=other), before, "") is None
    assert note_tried("r", trial, None, "") is None
