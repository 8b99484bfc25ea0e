"""A plan's work order with lessons, how it is kept, and its line."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from graph.config import RunConfig
from graph.planning.orders import (
    Curves,
    Orders,
    apply_lessons,
    describe_plan,
    drop_lessons,
    hash_request,
    keep_order,
    read_order,
    resolve,
)
from graph.planning.plan import Plan
from tests.situations import make_layers, make_lesson
from tools.base.errors import DamagedArtifact, ImpossiblePlan
from tools.plans.cuts import Cutting
from tools.plans.layer_profile import LayerProfile, predict_kl
from tools.plans.recipe import Adjustment, Recipe
from tools.plans.work_order import WorkOrder
from tools.workbench.store import ArtifactStore

LAYERS = make_layers()
GROUP = "blocks 4-5 · mlp.down_proj"
CONFIG = RunConfig()
LESSONS = (make_lesson(GROUP, 2.0), make_lesson(GROUP, 1.8), make_lesson("*", 3.0))
PLAN = Plan(sparsity=0.45, recipe=Recipe(curves="mask"))


def order(plan: Plan) -> WorkOrder:
    return resolve(plan, LAYERS, CONFIG)


def zeros_of_group(order: WorkOrder) -> int:
    return sum(zeros for name, zeros in order.zeros.items() if name[13] in "45" and "down" in name)


def test_lessons_move_the_allocation_whatever_the_plan_says() -> None:
    weighed = apply_lessons(PLAN, LESSONS, LAYERS, CONFIG)
    assert list(weighed.multipliers) == [GROUP] and 1.4 < weighed.multipliers[GROUP] < 1.9
    with_lessons, without = order(weighed), order(PLAN)
    assert zeros_of_group(with_lessons) < zeros_of_group(without)
    assert sum(with_lessons.zeros.values()) == sum(without.zeros.values())


def test_the_predicted_kl_stays_that_of_the_curves_as_measured() -> None:
    weighed = order(apply_lessons(PLAN, LESSONS, LAYERS, CONFIG))
    shares = np.array([weighed.zeros[layer.name] / layer.weights for layer in LAYERS])
    assert weighed.predicted_kl == predict_kl(LAYERS, shares)
    assert order(PLAN).predicted_kl < weighed.predicted_kl < 1.2 * order(PLAN).predicted_kl


def test_lessons_come_beneath_the_plans_own_factors() -> None:
    factor = 1.25
    own = Adjustment(selector=GROUP, action="factor", factor=factor)
    weighed = PLAN.model_copy(update={"multipliers": {GROUP: 1.6}, "adjustments": [own]})
    both = Adjustment(selector=GROUP, action="factor", factor=factor * 1.6)
    once = order(PLAN.model_copy(update={"adjustments": [both]}))
    assert (order(weighed).id, order(weighed).predicted_kl) == (once.id, once.predicted_kl)
    assert (order(weighed).multipliers, once.multipliers) == ({GROUP: 1.6}, {}), "which have no part in the id"


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


def test_the_users_pattern_holds_whatever_a_plan_says() -> None:
    layers = [layer.model_copy(update={"inputs": 20}) for layer in LAYERS]
    found = resolve(Plan(sparsity=0.5, recipe=Recipe(pattern="1:4")), layers, RunConfig(pattern="2:4"))
    assert {layer.recipe for layer in found.layers.values()} == {Recipe(pattern="2:4").within_layers()}
    assert set(found.zeros.values()) == {500}


def test_an_order_is_for_every_layer_what_is_done_and_how_much() -> None:
    found = order(PLAN)
    assert list(found.layers) == [layer.name for layer in LAYERS]
    assert {layer.recipe for layer in found.layers.values()} == {PLAN.recipe.within_layers()}
    assert found.line == describe_plan(PLAN)
    assert sum(found.zeros.values()) / 18_000 == found.sparsity == 0.45
    other = PLAN.model_copy(update={"recipe": Recipe(curves="mask", statistics="sequential")})
    assert order(other).zeros == found.zeros and order(other).id != found.id


# Kept from node to node


def test_a_kept_order_is_read_back_for_its_very_plan(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    plan = apply_lessons(PLAN, LESSONS, LAYERS, CONFIG)
    found = order(plan)
    kept = keep_order(store, plan, found)
    assert read_order(store, kept, Plan.model_validate_json(plan.model_dump_json())) == found
    assert list(read_order(store, kept, plan).zeros) == list(found.zeros), "in the model's order"  # type: ignore[union-attr]
    assert read_order(store, kept, plan.model_copy(update={"sparsity": 0.44})) is None, "edited since"
    assert read_order(store, "", plan) is None, "of an earlier version"
    size = store.path(kept, ".json").stat().st_size
    assert size < 2_000 + 60 * len(LAYERS), "the recipe of all layers is written once"
    store.path(kept, ".json").write_text("{}")
    with pytest.raises(DamagedArtifact):
        read_order(store, kept, plan)


def test_what_was_asked_for_has_a_hash_whatever_lessons_make_of_it() -> None:
    tilts = [
        PLAN.model_copy(update={"adjustments": [Adjustment(selector=s, action="factor", factor=2)] * 5})
        for s in ("*.v_proj", "*.q_proj")
    ]
    assert len({describe_plan(plan).split(" · ")[0] for plan in tilts}) == 1
    assert len({hash_request(plan) for plan in (PLAN, *tilts)}) == 3
    same = PLAN.model_copy(update={"multipliers": {GROUP: 1.5}, "reason": "why not", "reprofile": True})
    assert hash_request(same) == hash_request(PLAN)
    steps = PLAN.model_copy(update={"recipe": Recipe(method="wanda", refit_steps=3, curves="mask")})
    assert hash_request(steps) == hash_request(
        steps.model_copy(update={"recipe": Recipe(method="wanda", curves="mask")})
    )


# In one round


def make_orders(measured: list[Recipe]) -> Orders:
    """Of curves that nobody measured yet where a recipe asks for its own."""
    return Orders(CONFIG, LESSONS, LAYERS, lambda recipe: Curves(LAYERS, recipe in measured or not recipe.needs_curves))


def test_what_is_expected_of_a_plan_changes_nothing_that_is_done() -> None:
    plan = Plan(sparsity=0.45)
    bold = plan.model_copy(update={"hypothesis": "KL below 0.1.", "reason": "It was 0.2."})
    assert hash_request(bold) == hash_request(plan)
    assert resolve(bold, LAYERS, CONFIG).id == resolve(plan, LAYERS, CONFIG).id
    assert "hypothesis" not in plan.model_dump() and next(iter(bold.model_dump())) == "hypothesis"


def test_a_plan_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    orders, made = make_orders([]), []
    monkeypatch.setattr("graph.planning.orders.resolve", lambda *given: made.append(given[0]) or resolve(*given))
    first = orders.resolve(PLAN, pytest.fail)
    assert orders.draft(PLAN.model_copy(update={"reason": "said otherwise"})) is first
    assert orders.identify(PLAN) == first.id == orders.resolve(PLAN, pytest.fail).id
    assert len(made) == 1
    orders.draft(orders.weigh(PLAN))
    assert len(made) == 2


def test_curves_are_measured_for_what_is_carried_out_alone() -> None:
    measured: list[Recipe] = []
    orders = make_orders(measured)
    plan = Plan(sparsity=0.45)
    own = [layer.model_copy(update={"kappa": [k / (1 + layer.block) for k in layer.kappa]}) for layer in LAYERS]

    def measure(recipe: Recipe) -> list[LayerProfile]:
        measured.append(recipe)
        return own

    assert orders.identify(plan) == "" and orders.draft(plan).zeros and not measured
    with pytest.raises(ImpossiblePlan, match="allow at most"):
        orders.resolve(plan.model_copy(update={"adjustments": [Adjustment(selector="*", action="protect")]}), measure)
    assert not measured, "nothing is measured for an impossible plan"
    found = orders.resolve(plan, measure)
    assert measured == [plan.recipe]
    assert found == resolve(plan, own, CONFIG) and found.zeros != orders_by_mask(plan)
    assert orders.identify(plan) == found.id and orders.resolve(plan, pytest.fail) == found


def orders_by_mask(plan: Plan) -> dict[str, int]:
    return resolve(plan, LAYERS, CONFIG).zeros


def test_a_cut_is_refused_where_weights_are_set_to_zero() -> None:
    orders = Orders(CONFIG, (), LAYERS)
    with pytest.raises(ImpossiblePlan, match=r"^cut is of runs that take parts away, and this one sets weights"):
        orders.resolve(PLAN.model_copy(update={"cut": Cutting()}), lambda _: LAYERS)
