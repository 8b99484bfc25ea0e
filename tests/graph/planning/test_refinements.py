"""Small levers together, then one at a time: no weights come twice, and no plan is lost for a line like another's."""

import dataclasses

import pytest

from graph.config import RunConfig
from graph.planning.orders import Curves, describe_plan, drop_lessons
from graph.planning.plan import Plan
from graph.planning.refinements import STRONG, TOGETHER, WORTH, change_recipe, plan_refinements, rank_groups
from graph.planning.rule import MASKS, plan_by_rule
from graph.planning.situation import Situation
from tests.situations import make_layers, make_lesson, make_patterned, make_situation, make_trial, try_plan
from tools.plans.layer_profile import group_layers
from tools.plans.recipe import Adjustment, Recipe


def test_at_the_target_each_plan_changes_one_lever_or_all_small_ones_and_none_comes_twice() -> None:
    trials = [make_trial(1, "accept", 0.45, STRONG)]
    for _ in range(2, 60):
        plan = plan_by_rule(make_situation(*trials))
        if plan is None:
            break
        assert plan.sparsity == 0.45
        assert (plan.recipe != STRONG) + bool(plan.adjustments) == 1
        trials.append(try_plan(make_situation(*trials), plan, "rollback"))
    assert len({trial.plan for trial in trials}) == len(trials)
    assert len(trials) == 1 + 10 + 2 * len(group_layers(make_layers())), "ten recipes, two tilts of each group"
    every = STRONG.model_copy(update={**TOGETHER, "statistics": "sequential"})
    assert [trial.recipe for trial in trials[1:3]] == [every, STRONG.model_copy(update=TOGETHER)]


def test_every_change_but_one_says_what_it_did_where_it_was_measured() -> None:
    config = make_situation().config
    told = [(recipe, reason) for recipe, reason in change_recipe(STRONG, config, tuple)]
    silent = [recipe for recipe, reason in told if not any(words in reason for words in WORTH.values())]
    assert silent == [STRONG.model_copy(update=TOGETHER)]
    assert len(told) == len(WORTH.keys() - {"hedged", "grown"}) + len(silent)


def test_gamma_is_clipped_where_it_chooses_weights() -> None:
    for method, clipped in (("wanda", []), ("two-sided", ["two-sided"])):
        changes = change_recipe(Recipe(method=method), RunConfig(), tuple)
        assert [recipe.method for recipe, _ in changes if recipe.gamma == "clipped"] == clipped


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


def test_the_accepted_plan_is_tried_again_when_lessons_change_and_no_lever_is() -> None:
    selector = "blocks 0-1 · mlp.down_proj"
    trials = [make_trial(1, "accept", 0.45, STRONG)]
    lines: list[str] = []
    for iteration in range(2, 60):
        lessons = [make_lesson(selector, 1.5)] if iteration < 11 else [make_lesson(selector, 1.9)] * 3
        situation = make_situation(*trials, lessons=tuple(lessons))
        plan = plan_by_rule(situation)
        if plan is None:
            break
        lines.append(describe_plan(plan))
        trials.append(try_plan(situation, plan, "rollback"))
    again = [line for line in lines if line.startswith("45.0% refit:kappa-mask · lessons")]
    assert again == ["45.0% refit:kappa-mask · lessons x1 (1.23)", "45.0% refit:kappa-mask · lessons x1 (1.62)"]
    assert len(lines) == 10 + 2 * len(group_layers(make_layers())) + len(again)
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


def test_a_mask_within_outputs_is_one_lever_and_where_it_is_kept_the_rest_are_pulled_from_there() -> None:
    (rows,) = (x for x in refine(make_situation(make_trial(1, "accept", 0.45, STRONG))) if x.recipe.method == "wanda")
    assert rows.recipe.mask_label == "wanda+refit~damped0.3~dense" and rows.recipe.statistics == "dense"
    following = refine(make_situation(make_trial(1, "accept", 0.45, rows.recipe)))
    labels = [plan.recipe.mask_label for plan in following if not plan.adjustments]
    assert labels[:2] == ["refit~damped0.3", "wanda+refit~damped0.3"], "the strong mask again, and statistics in order"
    damped = STRONG.model_copy(update={"damping": 1.0})
    (own,) = (x for x in refine(make_situation(make_trial(1, "accept", 0.45, damped))) if x.recipe.method == "wanda")
    assert own.recipe.damping == 1.0


def test_the_same_weights_under_another_name_are_no_other_plan() -> None:
    """With a pattern nothing is shared out: curves and strengths change no weight."""
    situation = make_patterned()
    first = plan_by_rule(situation)
    assert first is not None
    kept = try_plan(situation, first, "accept")
    at_target = dataclasses.replace(make_patterned(kept), accepted_plan=first)
    plans = refine(at_target)
    together = "refit10~clipped~damped0.2"
    changes = [f"{together}~sequential", together, "refit~sequential", "refit10", "refit~damped0.3", "refit~clipped"]
    assert [plan.recipe.mask_label for plan in plans] == changes
    strength = first.model_copy(update={"recipe": STRONG.model_copy(update={"strength": 0.8})})
    assert at_target.find_trial(strength) == kept
    uniform = Plan(sparsity=0.45, recipe=Recipe(method="refit", allocation="uniform"))
    even = make_situation(make_trial(1, "accept", 0.45, uniform.recipe))
    orders = [even.orders.identify(plan) for plan in refine(even) if not plan.adjustments]
    assert len(set(orders)) == len(orders), "a strength of an even allocation is none"


def test_no_other_text_is_looked_for_before_its_turn() -> None:
    """It would be profiled."""
    changes = change_recipe(STRONG, RunConfig(polish_tokens=512), lambda: pytest.fail("nobody came to that yet"))
    assert next(changes)[0] == STRONG.model_copy(update={"polish": True})
    with pytest.raises(pytest.fail.Exception):
        next(changes)


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


def test_groups_cover_every_layer_once_and_rank_by_predicted_kl() -> None:
    layers = make_layers()
    groups = group_layers(layers)
    assert sorted(layer.name for group in groups.values() for layer in group) == sorted(layer.name for layer in layers)
    ranked = rank_groups(layers, dict.fromkeys((layer.name for layer in layers), 0.45))
    assert sum(share for _, share in ranked) == pytest.approx(1)
    assert [share for _, share in ranked] == sorted((share for _, share in ranked), reverse=True)
    assert ranked[0][0].startswith("blocks 4-5")
