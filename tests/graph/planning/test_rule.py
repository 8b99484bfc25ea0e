"""The rule: cheap first, stronger after a rollback, one lever at a time at the target, lessons in figures."""

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest

from graph.config import RunConfig
from graph.planning.orders import Curves, describe_plan, drop_lessons
from graph.planning.plan import Plan
from graph.planning.refinements import FINE_STEPS, STRONG, plan_refinements, rank_groups
from graph.planning.rule import LOST_ROUNDS, MASKS, calibration, find_relief, plan_by_rule
from graph.planning.situation import Situation
from graph.state import Trial
from tests.situations import make_layers, make_lesson, make_situation, make_trial, try_plan
from tools.base.errors import ImpossiblePlan
from tools.plans.layer_profile import group_layers
from tools.plans.recipe import Adjustment, Recipe

Record = Callable[[Situation, Plan], Trial]


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


def test_after_a_rollback_the_recipe_grows_stronger_and_then_the_step_shorter() -> None:
    start = make_trial(1, "accept", 0.3, MASKS)
    masks = make_trial(2, "rollback", 0.45, MASKS)
    plan = plan_by_rule(make_situation(start, masks))
    assert plan is not None
    assert (plan.sparsity, plan.recipe.refit) == (0.45, True)
    plan = plan_by_rule(make_situation(start, masks, make_trial(3, "rollback", 0.45, STRONG)))
    assert plan is not None
    assert (plan.sparsity, plan.recipe.refit) == (pytest.approx(0.375), True)


def record_by_line(situation: Situation, plan: Plan) -> Trial:
    """The trial of a plan in a run of an earlier version."""
    return try_plan(situation, plan, "rollback").model_copy(update={"order": "", "asked": ""})


RECORDS = pytest.mark.parametrize(
    "record", [partial(try_plan, verdict="rollback"), record_by_line], ids=["by order", "by line"]
)


@RECORDS
def test_at_the_target_each_plan_changes_one_lever_and_none_comes_twice(record: Record) -> None:
    trials = [make_trial(1, "accept", 0.45, STRONG)]
    for _ in range(2, 60):
        plan = plan_by_rule(make_situation(*trials))
        if plan is None:
            break
        assert plan.sparsity == 0.45
        assert (plan.recipe != STRONG) + bool(plan.adjustments) == 1
        trials.append(record(make_situation(*trials), plan))
    assert len({trial.plan for trial in trials}) == len(trials)
    assert len(trials) == 1 + 6 + 2 * len(group_layers(make_layers())), "six recipes, two tilts of each group"


def test_lessons_of_groups_weigh_in_every_plan_and_those_of_a_repeat_do_not() -> None:
    base = make_trial(1, "accept", 0.45, STRONG)
    selector = "blocks 0-1 · mlp.down_proj"
    for lessons, weighed in (
        ((make_lesson(selector, 2.0), make_lesson(selector, 0.5)), []),  # a contradicted lesson weighs nothing
        ((make_lesson(selector, 1.5), make_lesson("*", 1.7)), [selector]),
        ((make_lesson(selector, 1.5, same=True),), []),
    ):
        plan = plan_by_rule(make_situation(base, lessons=lessons))
        assert plan is not None
        assert (list(plan.multipliers), plan.adjustments) == (weighed, [])


@RECORDS
def test_the_accepted_plan_is_tried_again_when_lessons_change_and_no_lever_is(record: Record) -> None:
    selector = "blocks 0-1 · mlp.down_proj"
    trials = [make_trial(1, "accept", 0.45, STRONG)]
    lines: list[str] = []
    for iteration in range(2, 60):
        lessons = [make_lesson(selector, 1.5)] if iteration < 7 else [make_lesson(selector, 1.9)] * 3
        situation = make_situation(*trials, lessons=tuple(lessons))
        plan = plan_by_rule(situation)
        if plan is None:
            break
        lines.append(describe_plan(plan))
        trials.append(record(situation, plan))
    again = [line for line in lines if line.startswith("45.0% refit:kappa-mask · lessons")]
    assert again == ["45.0% refit:kappa-mask · lessons x1 (1.23)", "45.0% refit:kappa-mask · lessons x1 (1.62)"]
    assert len(lines) == 6 + 2 * len(group_layers(make_layers())) + len(again)
    levers = [drop_lessons(line) for line in lines if line not in again]
    assert len(set(levers)) == len(levers), "no lever comes again because lessons have changed"


def refine(situation: Situation) -> list[Plan]:
    """What the rule would try next at the target."""
    return list(plan_refinements(situation))


def test_plans_whose_lines_are_alike_are_told_apart() -> None:
    """Behind four adjustments a line tells no more; each tilt is another plan all the same."""
    own = [Adjustment(selector=f"blocks {i}", action="factor", factor=1 + i / 10) for i in range(1, 5)]
    base = Plan(sparsity=0.45, recipe=STRONG, adjustments=own)
    first = make_situation(make_trial(1, "accept", 0.45, STRONG))
    kept = try_plan(first, base, "accept")
    situation = dataclasses.replace(first, trials=(kept,), accepted=kept, accepted_plan=base)
    tilts = [plan for plan in refine(situation) if len(plan.adjustments) == 5]
    assert len(tilts) == 2 * len(group_layers(make_layers()))
    assert len({describe_plan(plan) for plan in tilts}) == 1
    tried = dataclasses.replace(situation, trials=(kept, try_plan(situation, tilts[0], "rollback")))
    assert [plan for plan in refine(tried) if len(plan.adjustments) == 5] == tilts[1:]


def test_the_same_weights_under_another_name_are_no_other_plan() -> None:
    """With a pattern nothing is shared out: curves and strengths change no weight."""
    situation = make_patterned()
    first = plan_by_rule(situation)
    assert first is not None
    kept = try_plan(situation, first, "accept")
    at_target = dataclasses.replace(make_patterned(kept), accepted_plan=first)
    plans = refine(at_target)
    assert [plan.recipe.mask_label for plan in plans] == ["refit~sequential", "refit10", "refit~clipped"]
    strength = first.model_copy(update={"recipe": STRONG.model_copy(update={"strength": 0.8})})
    assert at_target.find_trial(strength) == kept
    uniform = Plan(sparsity=0.45, recipe=Recipe(method="refit", allocation="uniform"))
    even = make_situation(make_trial(1, "accept", 0.45, uniform.recipe))
    orders = [even.orders.identify(plan) for plan in refine(even) if not plan.adjustments]
    assert len(set(orders)) == len(orders), "a strength of an even allocation is none"


def test_what_hangs_on_curves_that_nobody_measured_was_not_tried() -> None:
    plan = Plan(sparsity=0.45, recipe=Recipe())
    measured = dataclasses.replace(make_situation(), read_layers=lambda recipe: Curves(make_layers(), exact=True))
    trial = try_plan(measured, plan, "rollback")
    assert trial.order and make_situation().orders.identify(plan) == ""
    assert make_situation(trial).find_trial(plan) is None
    assert dataclasses.replace(make_situation(trial), read_layers=measured.read_layers).find_trial(plan) == trial


@pytest.mark.parametrize(
    ("kept", "proposed"),
    [
        (MASKS, STRONG),
        (
            Recipe(method="sparsegpt", statistics="sequential", strength=0.9),
            Recipe(method="refit", statistics="sequential", strength=0.9, curves="mask"),
        ),
    ],
)
def test_whatever_was_kept_the_strongest_method_comes_first(kept: Recipe, proposed: Recipe) -> None:
    plan = plan_by_rule(make_situation(make_trial(1, "accept", 0.45, kept)))
    assert plan is not None
    assert plan.recipe == proposed


def test_a_refused_plan_is_not_proposed_again() -> None:
    refused = make_trial(1, "refuse", 0.3, MASKS)
    plan = plan_by_rule(make_situation(refused))
    assert plan is not None
    assert (plan.recipe, plan.reason[:21]) == (STRONG, "Round 1 was refused; ")


def test_calibration_is_the_geometric_mean_of_this_recipe_alone() -> None:
    lessons = (
        *(make_lesson("*", 1.0), make_lesson("*", 4.0), make_lesson("*", 9.0, recipe="two-sided")),
        *(make_lesson("*", 1.5, confidence=0.0), make_lesson("*", 7.0, same=True)),
    )
    situation = make_situation(lessons=lessons)
    assert calibration(situation, STRONG) == pytest.approx(2.0)
    assert calibration(situation, MASKS) == pytest.approx(9.0)
    assert calibration(situation, Recipe(method="wanda")) == 1.0


def test_groups_cover_every_layer_once_and_rank_by_predicted_kl() -> None:
    layers = make_layers()
    groups = group_layers(layers)
    assert sorted(layer.name for group in groups.values() for layer in group) == sorted(layer.name for layer in layers)
    ranked = rank_groups(layers, dict.fromkeys((layer.name for layer in layers), 0.45))
    assert sum(share for _, share in ranked) == pytest.approx(1)
    assert [share for _, share in ranked] == sorted((share for _, share in ranked), reverse=True)
    assert ranked[0][0].startswith("blocks 4-5")


def make_patterned(*trials: Trial) -> Situation:
    """The situation of a run with a pattern."""
    layers = [layer.model_copy(update={"inputs": 20}) for layer in make_layers()]
    return dataclasses.replace(make_situation(*trials), config=RunConfig(pattern="2:4"), layers=layers)


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
    changes = [{}, {"statistics": "sequential"}, {"refit_steps": FINE_STEPS}, {"gamma": "clipped"}]
    assert found == [STRONG.model_copy(update=change) for change in changes]


@pytest.mark.parametrize(
    ("questions", "short", "text"),
    [("", [], "run"), ("file:qa.jsonl", [], "quarter"), ("file:qa.jsonl", ["quarter", "half"], "run")],
)
@pytest.mark.parametrize(("pattern", "verdict"), [("", "accept"), ("2:4", "rollback")])
def test_more_questions_in_the_calibration_text_are_tried_where_there_are_some(
    questions: str, short: list[str], text: str, pattern: str, verdict: str
) -> None:
    config = RunConfig(questions=questions, pattern=pattern)
    situation = make_situation(make_trial(1, verdict, config.target_sparsity, STRONG))

    layers = make_patterned().layers

    def read_layers(recipe: Recipe) -> Curves:
        if recipe.calibration in short:
            raise ImpossiblePlan("there are fewer")
        return Curves(layers, exact=recipe.calibration == "run")

    plan = plan_by_rule(dataclasses.replace(situation, config=config, layers=layers, read_layers=read_layers))
    assert plan is not None
    assert plan.recipe == STRONG.model_copy(
        update={"calibration": text, "statistics": "sequential" if text == "run" else "dense"}
    )


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
