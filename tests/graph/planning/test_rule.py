"""The rule: cheap first, stronger after a rollback, one lever at a time at the target, lessons in figures."""

import dataclasses
from typing import Any

import pytest

from graph.config import RunConfig
from graph.planning.budget import TokenBudget
from graph.planning.orders import Curves
from graph.planning.refinements import (
    DAMPED,
    FINE_STEPS,
    HEDGED,
    MASKS,
    MISLED,
    STRONG,
    TOGETHER,
    WORTH,
    change_recipe,
)
from graph.planning.rule import LOST_ROUNDS, calibration, find_relief, list_candidates, plan_by_rule
from tests.situations import make_lesson, make_patterned, make_situation, make_trial, try_plan
from tools.base.errors import ImpossiblePlan
from tools.plans.mix import mix_questions
from tools.plans.recipe import Recipe
from tools.results.trial import Trial


def test_the_first_round_is_cheap_and_short_of_the_target() -> None:
    plan = plan_by_rule(make_situation())
    assert plan is not None
    assert (plan.sparsity, plan.recipe.refit) == (0.3, False)


@pytest.mark.parametrize(("scale", "refit"), [(1.0, False), (100.0, True)])
def test_masks_alone_only_where_they_are_predicted_to_pass(scale: float, refit: bool) -> None:
    first = make_trial(1, "accept", 0.3, MASKS)
    plan = plan_by_rule(make_situation(first, scale=scale))
    assert plan is not None
    assert (plan.sparsity, plan.recipe.refit) == (0.45, refit)


@pytest.mark.parametrize(("times", "recipe"), [(0.99 * MISLED, STRONG), (1.01 * MISLED, HEDGED)])
def test_curves_that_were_far_off_are_not_gone_by(times: float, recipe: Recipe) -> None:
    first = make_trial(1, "accept", 0.3, MASKS).model_copy(update={"kl": 0.05 * times})
    misled = make_situation(first, scale=100.0)
    plan = plan_by_rule(misled)
    assert plan is not None and (plan.sparsity, plan.recipe) == (0.45, recipe)
    assert recipe in [x.recipe for x in list_candidates(misled, 12)]
    assert HEDGED.label == "wanda+refit~damped0.3~dense:kappa-mask@0.5"
    undone = make_trial(2, "rollback", 0.45, recipe)
    plan = plan_by_rule(make_situation(first, undone, scale=100.0))
    assert plan is not None and (plan.sparsity, plan.recipe) == (pytest.approx(0.375), recipe)
    plan = plan_by_rule(make_situation(first, make_trial(2, "rollback", 0.45, MASKS)))
    assert plan is not None and (plan.sparsity, plan.recipe) == (0.45, recipe)


def test_at_the_target_they_are_mistrusted_first() -> None:
    first = make_trial(1, "accept", 0.3, MASKS).model_copy(update={"kl": 1.0})
    target = RunConfig().target_sparsity
    reached = make_situation(first, make_trial(2, "accept", target, STRONG))
    plan = plan_by_rule(reached)
    assert plan is not None and plan.recipe == HEDGED and WORTH["hedged"] in plan.reason
    assert find_relief(reached) == "the target is reached, but wanda with a refit has not been tried there"
    tried = make_situation(first, make_trial(2, "accept", target, HEDGED))
    plan = plan_by_rule(tried)
    assert plan is not None and plan.recipe == HEDGED.model_copy(update={"method": "refit"}), "the other mask, hedged"
    behind = [recipe for recipe, _ in change_recipe(HEDGED, RunConfig(), tuple)]
    assert behind[:2] == [plan.recipe, HEDGED.model_copy(update={"statistics": "sequential"})]
    assert find_relief(tried) == ""
    again = make_situation(first, make_trial(2, "accept", target, STRONG), make_trial(3, "rollback", target, HEDGED))
    plan = plan_by_rule(again)
    assert plan is not None and plan.recipe == STRONG.model_copy(update={**TOGETHER, "statistics": "sequential"})


def test_a_pattern_is_not_planned_without_it() -> None:
    far = make_trial(1, "rollback", 0.5, MASKS).model_copy(update={"kl": 1.0})
    plan = plan_by_rule(make_patterned(far))
    assert plan is not None and plan.recipe == STRONG


def test_after_a_rollback_the_recipe_grows_stronger_and_then_the_step_shorter() -> None:
    start = make_trial(1, "accept", 0.3, MASKS)
    masks = make_trial(2, "rollback", 0.45, MASKS)
    plan = plan_by_rule(make_situation(start, masks))
    assert plan is not None
    assert (plan.sparsity, plan.recipe.refit) == (0.45, True)
    plan = plan_by_rule(make_situation(start, masks, make_trial(3, "rollback", 0.45, STRONG)))
    assert plan is not None
    assert (plan.sparsity, plan.recipe.refit) == (pytest.approx(0.375), True)


def test_steps_that_cannot_be_told_from_what_was_accepted_are_not_planned() -> None:
    start, trials = make_trial(1, "accept", 0.3, STRONG), list[Trial]()
    while (plan := plan_by_rule(make_situation(start, *trials))) is not None:
        assert plan.sparsity > 0.3
        trials.append(make_trial(len(trials) + 2, "rollback", plan.sparsity, plan.recipe))
        assert len(trials) < 12
    steps = [trial.sparsity for trial in trials]
    assert steps == sorted(steps, reverse=True) and steps[-1] - 0.3 < 0.001


@pytest.mark.parametrize(("tokens", "plans"), [(256, True), (255, False)])
def test_below_the_target_nothing_is_planned_that_there_are_not_the_tokens_for(tokens: int, plans: bool) -> None:
    situation = make_situation()
    config = situation.config.model_copy(update={"max_evaluated_tokens": tokens})
    budget = TokenBudget(config, 0, 256)
    assert (plan_by_rule(dataclasses.replace(situation, config=config, budget=budget)) is not None) is plans


def test_a_refused_plan_is_not_proposed_again() -> None:
    refused = make_trial(1, "refuse", 0.3, MASKS)
    plan = plan_by_rule(make_situation(refused))
    assert plan is not None
    assert (plan.recipe, plan.reason[:21]) == (STRONG, "Round 1 was refused; ")


def test_calibration_is_the_geometric_mean_of_this_recipe_alone() -> None:
    lessons = (
        *(make_lesson("*", 1.0), make_lesson("*", 4.0), make_lesson("*", 9.0, recipe="two-sided")),
        *(make_lesson("*", 1.5, confidence=0.0), make_lesson("*", 7.0, same=True)),
        make_lesson("*", 7.0).model_copy(update={"calibration": "hub:other:train"}),
        make_lesson("*", 7.0).model_copy(update={"calibration": "pydoc", "pattern": "2:4"}),
    )
    situation = make_situation(lessons=lessons)
    assert calibration(situation, STRONG) == pytest.approx(2.0)
    assert calibration(situation, MASKS) == pytest.approx(9.0)
    assert calibration(situation, Recipe(method="wanda")) == 1.0


def test_a_pattern_is_planned_in_one_step() -> None:
    plan = plan_by_rule(make_patterned())
    assert plan is not None
    assert (plan.sparsity, plan.recipe, plan.reason) == (0.5, STRONG, "2:4 in one step, with the strongest recipe.")


def test_a_pattern_that_did_not_pass_is_not_proposed_again() -> None:
    """Neither do levers that only share sparsity out, where a pattern leaves nothing to share."""
    trials: list[Trial] = []
    found = []
    while True:
        situation = make_patterned(*trials)
        plan = plan_by_rule(situation)
        if plan is None:
            break
        found.append(plan.recipe)
        trials.append(try_plan(situation, plan, ("refuse", "rollback")[len(trials) % 2]))
    single: list[dict[str, Any]] = [{"refit_steps": FINE_STEPS}, {"damping": DAMPED}, {"gamma": "clipped"}]
    order = {"statistics": "sequential"}
    changes = [{}, {**TOGETHER, **order}, TOGETHER, order, *single]
    assert found == [STRONG.model_copy(update=change) for change in changes]


@pytest.mark.parametrize(
    ("questions", "short", "share"),
    [("", [], 0.0), ("file:qa.jsonl", [], 0.25), ("file:qa.jsonl", [0.25], 0.5), ("file:qa.jsonl", [0.25, 0.5], 0.0)],
)
@pytest.mark.parametrize(("pattern", "verdict"), [("", "accept"), ("2:4", "rollback")])
def test_more_questions_in_the_statistics_are_tried_where_there_are_some(
    questions: str, short: list[float], share: float, pattern: str, verdict: str
) -> None:
    config = RunConfig(questions=questions, pattern=pattern)
    make = make_patterned if pattern else make_situation
    situation, layers = make(make_trial(1, verdict, config.target_sparsity, STRONG)), make_patterned().layers

    def read_layers(recipe: Recipe) -> Curves:
        if recipe.mix in map(mix_questions, short):
            raise ImpossiblePlan("there are fewer")
        return Curves(layers, exact=not recipe.mix)

    plan = plan_by_rule(dataclasses.replace(situation, config=config, layers=layers, read_layers=read_layers))
    assert plan is not None
    small: dict[str, Any] = {**TOGETHER, "statistics": "sequential"}
    assert plan.recipe == STRONG.model_copy(update={"mix": mix_questions(share)} if share else small)


@pytest.mark.parametrize("verdict", ["accept", "rollback", "refuse"])
def test_a_planner_is_relieved_once_at_the_target_for_the_strongest_method(verdict: str) -> None:
    target = RunConfig().target_sparsity
    weak = make_trial(1, "accept", target, Recipe(method="wanda"))
    below = make_trial(2, "rollback", target - 0.1, STRONG)
    for trials in ((weak,), (weak, below)):
        assert find_relief(make_situation(*trials)) == "the target is reached, but refit has not been tried there"
    assert find_relief(make_situation(make_trial(1, "accept", target - 0.1, Recipe(method="wanda")))) == ""
    strong = plan_by_rule(make_situation(weak))
    assert strong is not None and (strong.sparsity, strong.recipe.method) == (target, "refit")
    assert find_relief(make_situation(weak, make_trial(2, verdict, target, strong.recipe))) == ""


@pytest.mark.parametrize("start", [0.2, RunConfig().target_sparsity])
def test_a_planner_that_gets_nowhere_is_relieved_every_third_round(start: float) -> None:
    kept = make_trial(1, "accept", start, STRONG)
    lost = [make_trial(number, "rollback", 0.4, MASKS) for number in range(2, 9)]
    relieved = [bool(find_relief(make_situation(kept, *lost[:count]))) for count in range(8)]
    assert relieved == [False, False, True, False, False, True, False, False]
    assert find_relief(make_situation(kept, *lost[:LOST_ROUNDS])) == "2 rounds in a row brought nothing"
    assert find_relief(make_situation()) == ""


def test_a_planner_that_has_not_reached_the_target_is_relieved_in_the_last_round() -> None:
    trial = make_trial(1, "accept", 0.1, MASKS)
    last = dataclasses.replace(make_situation(trial), is_last=True)
    assert find_relief(last) == "the target is not reached, and this is the last round"
    plan = plan_by_rule(last)
    assert plan is not None and plan.sparsity == RunConfig().target_sparsity
    assert find_relief(dataclasses.replace(make_situation(), is_last=True)) == "", "it may have one round alone"
    reached = make_trial(1, "accept", RunConfig().target_sparsity, STRONG)
    assert find_relief(dataclasses.replace(make_situation(reached), is_last=True)) == ""
