"""Random plans."""

import pytest

from graph.ablation.arms import draw_plan
from graph.config import RunConfig
from graph.planning.orders import resolve
from tests.profiles import make_profile
from tools.base.errors import ImpossiblePlan
from tools.plans.groups import GroupRecipe
from tools.plans.methods import METHODS
from tools.plans.recipe import Recipe
from tools.plans.rules import RULES

LAYERS = [
    make_profile(block, kind, 1000, [0.001, 0.004, 0.01, 0.03, 0.1]).model_copy(update={"inputs": 20})
    for block in range(6)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
]
CONFIG = RunConfig(seed=7, target_sparsity=0.45, questions="file:questions.jsonl", polish_tokens=4096)
PLANS = [draw_plan(LAYERS, CONFIG, number) for number in range(200)]


def test_a_random_plan_depends_on_seed_and_number_alone() -> None:
    assert PLANS == [draw_plan(LAYERS, CONFIG, number) for number in range(200)]
    other = CONFIG.model_copy(update={"seed": 8})
    assert PLANS != [draw_plan(LAYERS, other, number) for number in range(200)]


def test_every_lever_of_a_planner_is_drawn_and_half_of_the_plans_leave_it_alone() -> None:
    recipes = [plan.recipe for plan in PLANS]
    assert {recipe.method for recipe in recipes} == set(METHODS)
    assert {recipe.allocation for recipe in recipes} == set(RULES)
    for lever in set(Recipe.model_fields) - {"pattern", "polish_tokens", "mix"}:
        drawn = [getattr(recipe, lever) for recipe in recipes]
        assert len(set(drawn)) > 1 and drawn.count(Recipe.model_fields[lever].default) >= 80, lever
    mixes = [recipe.mix for recipe in recipes]
    assert mixes.count(()) >= 80 and len(set(mixes)) > 30
    assert {name for mix in mixes for name, _ in mix} == {"run", "questions"}
    without = [draw_plan(LAYERS, CONFIG.model_copy(update={"questions": ""}), number) for number in range(200)]
    assert {plan.recipe.mix for plan in without} == {()}
    frugal = [draw_plan(LAYERS, CONFIG.model_copy(update={"polish_tokens": 0}), number) for number in range(200)]
    assert not any(plan.recipe.polish for plan in frugal)


def test_where_texts_have_names_mixtures_of_them_are_drawn_and_what_wants_one_text_is_not() -> None:
    named = RunConfig(seed=7, target_sparsity=0.45, text={"code": "pydoc", "own": "self"})
    plans = [draw_plan(LAYERS, named, number) for number in range(100)]
    of_plans = [plan.recipe.mix for plan in plans]
    of_groups = [group.recipe.mix for plan in plans for group in plan.groups]
    for mixes in (of_plans, of_groups):
        assert len(mixes) / 3 < mixes.count(()) < 2 * len(mixes) / 3 and len(set(mixes)) > 20
        assert all(sum(share for _, share in mix) == pytest.approx(1, abs=2e-4) for mix in mixes if mix)


def test_adjustments_are_of_every_kind_and_factors_only_where_curves_are_read() -> None:
    kinds = {adjustment.action for plan in PLANS for adjustment in plan.adjustments}
    assert kinds == {"factor", "bounds", "protect"}
    assert {len(plan.adjustments) for plan in PLANS} == {0, 1, 2, 3, 4}
    for plan in PLANS:
        assert plan.sparsity == 0.45
        assert plan.recipe.reads_curves or all(x.action != "factor" for x in plan.adjustments)


def test_groups_are_drawn_with_every_lever_that_may_differ_and_half_of_the_plans_have_none() -> None:
    own = [group.recipe for plan in PLANS for group in plan.groups]
    assert 80 <= sum(not plan.groups for plan in PLANS) <= 120
    assert {group.selector for plan in PLANS for group in plan.groups} == {layer.kind for layer in LAYERS}
    for lever in set(GroupRecipe.model_fields) - {"mix"}:
        drawn = [getattr(recipe, lever) for recipe in own]
        assert len(set(drawn)) > 1 and drawn.count(GroupRecipe.model_fields[lever].default) >= len(own) / 3, lever
    user = CONFIG.model_copy(update={"pattern": "2:4"})
    patterned = [group.recipe.pattern for n in range(50) for group in draw_plan(LAYERS, user, n).groups]
    assert set(patterned) == {""}


def test_most_random_plans_can_be_met_to_the_weight() -> None:
    met = 0
    for plan in PLANS:
        if plan.recipe.allocation in ("owl", "alphapruning"):
            continue  # these layers were never looked at for outliers or spectra
        try:
            order = resolve(plan, LAYERS, CONFIG)
        except ImpossiblePlan:
            continue
        met += 1
        assert sum(order.zeros.values()) == 5400
    assert met > 100
