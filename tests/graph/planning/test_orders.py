"""A plan's allocation with lessons, and its line."""

import numpy as np
import pytest
from pydantic import ValidationError

from graph.config import RunConfig
from graph.planning.orders import allocate_plan, apply_lessons, describe_plan, drop_lessons
from graph.planning.plan import Plan
from tests.situations import make_layers, make_lesson
from tools.plans.allocate import Allocation
from tools.plans.layer_profile import predict_kl
from tools.plans.recipe import Adjustment, Recipe

LAYERS = make_layers()
GROUP = "blocks 4-5 · mlp.down_proj"
CONFIG = RunConfig()
LESSONS = (make_lesson(GROUP, 2.0), make_lesson(GROUP, 1.8), make_lesson("*", 3.0))
PLAN = Plan(sparsity=0.45, recipe=Recipe(curves="mask"))


def allocate(plan: Plan) -> Allocation:
    return allocate_plan(LAYERS, plan, CONFIG)


def zeros_of_group(allocation: Allocation) -> int:
    return sum(zeros for name, zeros in allocation.zeros.items() if name[13] in "45" and "down" in name)


def test_lessons_move_the_allocation_whatever_the_plan_says() -> None:
    weighed = apply_lessons(PLAN, LESSONS, LAYERS, CONFIG)
    assert list(weighed.multipliers) == [GROUP] and 1.4 < weighed.multipliers[GROUP] < 1.9
    with_lessons, without = allocate(weighed), allocate(PLAN)
    assert zeros_of_group(with_lessons) < zeros_of_group(without)
    assert sum(with_lessons.zeros.values()) == sum(without.zeros.values())


def test_the_predicted_kl_stays_that_of_the_curves_as_measured() -> None:
    allocation = allocate(apply_lessons(PLAN, LESSONS, LAYERS, CONFIG))
    shares = np.array([allocation.zeros[layer.name] / layer.weights for layer in LAYERS])
    assert allocation.predicted_kl == predict_kl(LAYERS, shares)
    assert allocate(PLAN).predicted_kl < allocation.predicted_kl < 1.2 * allocate(PLAN).predicted_kl


def test_lessons_come_beneath_the_plans_own_factors() -> None:
    factor = 1.25
    own = Adjustment(selector=GROUP, action="factor", factor=factor)
    weighed = PLAN.model_copy(update={"multipliers": {GROUP: 1.6}, "adjustments": [own]})
    both = Adjustment(selector=GROUP, action="factor", factor=factor * 1.6)
    assert allocate(weighed) == allocate(PLAN.model_copy(update={"adjustments": [both]}))


@pytest.mark.parametrize("allocation", ["uniform", "owl", "alphapruning"])
def test_lessons_weigh_in_the_kappa_allocation_only(allocation: str) -> None:
    plan = Plan(sparsity=0.45, recipe=Recipe.model_validate({"allocation": allocation}), multipliers={GROUP: 1.5})
    assert apply_lessons(plan, LESSONS, LAYERS, CONFIG).multipliers == {}
    pattern = RunConfig(pattern="2:4")
    assert apply_lessons(PLAN, LESSONS, LAYERS, pattern).multipliers == {}


def test_what_a_plan_says_of_multipliers_is_replaced() -> None:
    plan = PLAN.model_copy(update={"multipliers": {"*.v_proj": 2.0}})
    assert apply_lessons(plan, (), LAYERS, CONFIG) == PLAN


def test_planners_do_not_see_multipliers_and_nobody_exceeds_their_bounds() -> None:
    assert "multipliers" not in str(Plan.model_json_schema())
    with pytest.raises(ValidationError, match="less than or equal to 2"):
        Plan.model_validate(PLAN.model_dump() | {"multipliers": {GROUP: 20}})


@pytest.mark.parametrize(
    ("multipliers", "end"),
    [
        ({}, ""),
        ({GROUP: 1.414}, " · lessons x1 (1.41)"),
        ({GROUP: 1.414, "blocks 0-1": 0.8, "*.v_proj": 1.2}, " · lessons x3 (0.80–1.41)"),
    ],
)
def test_the_line_says_how_many_groups_lessons_weigh(multipliers: dict[str, float], end: str) -> None:
    own = Adjustment(selector="*.v_proj", action="factor", factor=2)
    plan = PLAN.model_copy(update={"multipliers": multipliers, "adjustments": [own]})
    assert describe_plan(plan) == f"45.0% refit:kappa-mask · *.v_proj x2{end}"
    assert drop_lessons(describe_plan(plan)) == "45.0% refit:kappa-mask · *.v_proj x2"
