"""Plans whose groups have recipes of their own: shared out by each layer's own curve, carried out, kept and told."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from graph.config import RunConfig
from graph.planning.approval import read_answer
from graph.planning.budget import TokenBudget
from graph.planning.orders import (
    Curves,
    Orders,
    apply_lessons,
    describe_plan,
    hash_request,
    keep_order,
    read_order,
    resolve,
)
from graph.planning.plan import Plan, drop_schema, find_schema
from graph.planning.recipes import list_recipes
from graph.reflecting.rule import draw_lesson
from tests.benches import artifact_path, ignore, open_bench
from tests.situations import make_layers, make_lesson, make_situation, make_trial, open_orders
from tests.tiny import tiny_settings
from tools.base.errors import ImpossiblePlan
from tools.plans.costs import count_walk
from tools.plans.groups import Group
from tools.plans.layer_profile import LayerProfile, select_layers
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_all
from tools.workbench.bench import Workbench
from tools.workbench.store import DENSE, ArtifactStore

LAYERS = [layer.model_copy(update={"inputs": 20}) for layer in make_layers()]
CONFIG = RunConfig()
SEQUENTIAL = Recipe(statistics="sequential")
V, Q = ("self_attn.v_proj", "self_attn.q_proj")


def make_plan(groups: dict[str, dict[str, Any]], recipe: Recipe | None = None, **fields: Any) -> Plan:
    told = [Group.model_validate({"selector": selector, "recipe": own}) for selector, own in groups.items()]
    return Plan(sparsity=0.45, recipe=recipe or Recipe(curves="mask"), groups=told, **fields)


PLAN = make_plan({V: {"method": "wanda"}, "blocks 0-2": {"pattern": "2:4"}})


def test_a_plan_without_groups_is_what_it_always_was() -> None:
    plan = Plan(sparsity=0.45, recipe=Recipe(curves="mask"))
    written = hashlib.sha256(plan.model_dump_json().encode()).hexdigest()
    found = resolve(plan, make_layers(), CONFIG).id, hash_request(plan), written
    assert [digest[:16] for digest in found] == ["08621f61f0a23a3d", "f68a2b3f76eeaf25", "db7cc57796f023db"]
    exempt = make_plan({V: {}})
    assert resolve(exempt, LAYERS, CONFIG).id == found[0] and "groups" not in plan.model_dump()


def test_every_layer_has_its_own_recipe_and_the_sum_meets_the_plan() -> None:
    found = resolve(PLAN, LAYERS, CONFIG)
    assert sum(found.zeros.values()) == 8_100
    for layer in LAYERS:
        own = {"method": "wanda"} if layer.kind == V else {"pattern": "2:4"} if layer.block < 3 else {}
        assert found.layers[layer.name].recipe == PLAN.recipe.model_copy(update=own).within_layers()
        assert (found.zeros[layer.name] == 500) or not own.get("pattern")
    assert found.line == "45.0% refit:kappa-mask · wanda+refit~dense in self_attn.v_proj, refit 2:4 in blocks 0-2"
    assert found.id == resolve(PLAN.model_copy(update={"reason": "no other"}), LAYERS, CONFIG).id
    others = [make_plan({V: {"method": "wanda"}}), make_plan({V: {"method": "magnitude"}}), make_plan({})]
    assert len({found.id, *(resolve(plan, LAYERS, CONFIG).id for plan in others)}) == 4
    assert len({hash_request(plan) for plan in (PLAN, *others)}) == 4
    again = make_plan({f" {V}": {"method": "wanda", "refit_steps": 9}, "blocks 0-2": {"pattern": "2:4"}})
    assert hash_request(again) == hash_request(PLAN), "steps are those of refit alone"


@pytest.mark.parametrize(
    ("plan", "config", "sentence"),
    [
        (make_plan({"*.k_proj": {}}), CONFIG, r"selector '\*\.k_proj' means no layer; layers are named like "),
        (make_plan({"*": {}}), CONFIG, "groups take every layer, so that the plan's recipe counts for none; "),
        (
            make_plan({V: {"statistics": "sequential", "mix": {"run": 1, "questions": 1}}}, SEQUENTIAL),
            CONFIG,
            "statistics behind pruned predecessors in one round are of one calibration text, and not of 'run' and ",
        ),
        (
            make_plan({V: {"pattern": "1:4"}}),
            RunConfig(pattern="2:4"),
            "group 'self_attn.v_proj' has pattern 1:4, and this run has 2:4 in all layers; leave pattern out",
        ),
        (make_plan({V: {"mix": {"code": 1}}}, Recipe(polish=True)), CONFIG, "a polish of all layers is on one text; "),
        (make_plan({V: {"pattern": "1:3"}}), CONFIG, "model.layers.0.self_attn.v_proj has 20 inputs, not divisible"),
    ],
)
def test_what_cannot_be_is_one_line(plan: Plan, config: RunConfig, sentence: str) -> None:
    with pytest.raises(ImpossiblePlan, match=f"^{sentence}"):
        Orders(config, (), LAYERS).draft(plan)


def test_the_users_pattern_is_in_every_group_whose_methods_may_differ() -> None:
    half = make_plan({V: {"method": "wanda"}}).model_copy(update={"sparsity": 0.5})
    found = resolve(half, LAYERS, RunConfig(pattern="2:4"))
    assert {(layer.recipe.method, layer.recipe.pattern) for layer in found.layers.values()} == {
        ("wanda", "2:4"),
        ("refit", "2:4"),
    }


# By each layer's own curve


def test_a_layers_curve_is_that_of_its_own_recipe_measured_once_for_each() -> None:
    plan = make_plan({V: {"method": "wanda"}, Q: {"pattern": "2:4"}}, Recipe())
    measured: list[Recipe] = []
    orders = Orders(CONFIG, (), LAYERS, lambda recipe: Curves(LAYERS, recipe in measured or not recipe.needs_curves))

    def measure(recipe: Recipe) -> list[LayerProfile]:
        measured.append(recipe)
        scale = 4.0 if recipe.method == "wanda" else 1.0
        return [layer.model_copy(update={"kappa": [scale * k for k in layer.kappa]}) for layer in LAYERS]

    assert orders.identify(plan) == "" and not measured
    found = orders.resolve(plan, measure)
    assert measured == list_recipes(plan, CONFIG)[:2], "a pattern needs no curve"
    dear = [x.model_copy(update={"kappa": [4 * k for k in x.kappa]}) if x.kind == V else x for x in LAYERS]
    assert found == resolve(plan, dear, CONFIG)
    assert sum(found.zeros.values()) == 8_100
    cheap = resolve(plan, LAYERS, CONFIG)
    names = [layer.name for layer in LAYERS if layer.kind == V]
    assert sum(found.zeros[name] for name in names) < sum(cheap.zeros[name] for name in names)
    assert orders.identify(plan) == found.id == orders.resolve(plan, pytest.fail).id


def test_a_plan_costs_what_its_recipes_cost() -> None:
    budget = TokenBudget(CONFIG, 0, 100)
    staged = {"statistics": "sequential"}
    plan = make_plan({V: {"method": "wanda"}, Q: staged}, Recipe(statistics="sequential"))
    order = resolve(plan, LAYERS, CONFIG)
    text = CONFIG.calibration_windows * CONFIG.window
    assert budget.list_costs(plan, order) == {
        "curves of refit": count_walk(CONFIG),
        "curves of wanda+refit~dense": count_walk(CONFIG),
        f"walk of order {order.id}": (1 + 1) * text,
    }
    apart = {V: {"method": "magnitude", "refit": False}}
    summed = make_plan(apart, Recipe(statistics="sequential", curves="mask"))
    order = resolve(summed, LAYERS, CONFIG)
    assert budget.list_costs(summed, order)[f"walk of order {order.id}"] == (1 + 2) * text, "each kind of sums apart"


# Kept, told and learnt from


def test_it_is_kept_and_read_back(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    order = resolve(PLAN, LAYERS, CONFIG)
    kept = keep_order(store, PLAN, order)
    assert read_order(store, kept, Plan.model_validate_json(PLAN.model_dump_json())) == order
    assert read_order(store, kept, PLAN.model_copy(update={"groups": PLAN.groups[:1]})) is None


def test_planners_answer_with_groups_in_every_kind_of_run() -> None:
    told = {"sparsity": 0.4, "groups": [{"selector": V, "recipe": {"method": "wanda", "refit": False}}]}
    for given in ((0,), (100,), (0, ("code",)), (0, (), "2:4"), (100, ("code",), "2:4")):
        assert drop_schema(find_schema(*given).model_validate(told)) == Plan.model_validate(told)
    schemas = [find_schema(*given).model_json_schema() for given in ((0,), (0, ("code",)), (0, (), "2:4"))]
    fields = [set(schema["$defs"]["GroupRecipe"]["properties"]) for schema in schemas]
    assert fields[1] - fields[0] == {"mix"} and fields[0] - fields[2] == {"pattern"}
    mixed = {"sparsity": 0.4, "groups": [{"selector": V, "recipe": {"mix": {"code": 2}}}]}
    assert drop_schema(find_schema(0, ("code",)).model_validate(mixed)) == Plan.model_validate(mixed)
    shown = PLAN.model_dump(exclude={"multipliers"})
    assert read_answer({"decision": "accept", "plan": shown}, PLAN).decision == "accept", "a form as it was"
    with pytest.raises(ValueError, match=r"^a plan is given, and the decision is accept; edit has it carried out$"):
        read_answer({"decision": "accept", "plan": {"sparsity": 0.2}}, PLAN)
    answer = read_answer('{"groups": [{"selector": "*.q_proj", "recipe": {"refit_steps": 9}}]}', PLAN)
    assert answer.plan is not None and describe_plan(answer.plan) == "45.0% refit:kappa-mask · refit9 in *.q_proj"


def test_lessons_of_other_groups_weigh_half() -> None:
    layers, plain = make_layers(), make_plan({})
    trial = make_trial(2, "accept", 0.45, PLAN.recipe)
    moved = {layer.name: 0.45 for layer in layers}
    own = draw_lesson("r", layers, trial.model_copy(update={"groups": PLAN.groups}), moved, trial, moved)
    assert own is not None and own.selector == "*", "a recipe in other groups is another recipe"
    assert own.recipe == "refit [self_attn.v_proj: wanda+refit~dense] [blocks 0-2: refit 2:4]"
    both = [make_lesson("blocks 4-5", 2.0, recipe=recipe) for recipe in (own.recipe, "refit")]
    factors = [apply_lessons(plan, [x], layers, CONFIG).multipliers[x.selector] for x in both for plan in (PLAN, plain)]
    assert factors[0] == factors[3] > factors[1] == factors[2] > 1
    broken = make_trial(1, "rollback", 0.3, PLAN.recipe).model_copy(update={"broken": True})
    assert make_situation(broken).broken == {"refit"}
    assert make_situation(broken.model_copy(update={"groups": PLAN.groups})).broken == set(), "nobody knows which"


# Carried out


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Workbench:
    return open_bench(tiny_settings(tiny_llama), tmp_path / "run")


def test_masks_of_a_group_are_those_of_a_run_of_its_recipe(bench: Workbench) -> None:
    """Where statistics are dense; what is pruned in order is behind all that is pruned before it."""
    profile = bench.profile(ignore)
    ordered, dense = "blocks 1 · *.down_proj", ("*.v_proj", "*.up_proj")
    plan = make_plan(
        {
            ordered: {"statistics": "sequential"},
            dense[0]: {"method": "wanda", "refit": False},
            dense[1]: {"method": "sparsegpt", "pattern": "2:4"},
        },
        Recipe(statistics="dense"),
    )
    order = open_orders(bench, profile, CONFIG, DENSE)(plan)
    made = bench.pruner.prune(profile, order, ignore)
    zeros, weights = bench.weights.count_zeros()
    assert zeros == round(0.45 * weights)
    layers = bench.profiles.read(profile).layers
    found = {layer.name: layer.weight_OI.clone() for layer in bench.weights.layers}
    for name in select_layers(dense[1], layers):
        assert bool(((found[name] == 0).reshape(-1, 4).sum(1) == 2).all())
    by = {name: layer.recipe for name, layer in order.layers.items()}
    for recipe in dict.fromkeys(by.values()):
        others = {name: own for name, own in by.items() if own.group}  # which have no such number of zeros
        own = Recipe() if recipe.group else recipe
        alone = order_all(own, order.zeros, sparsity=0.45, predicted_kl=0.0, others=others)
        checkpoint = bench.pruner.prune(profile, alone, ignore)
        for layer in bench.weights.layers:
            if by[layer.name] == recipe:
                assert torch.equal(layer.weight_OI, found[layer.name]) is (recipe.statistics == "dense"), layer.name
        assert bench.pruner.is_made_of(made, profile, order) and not bench.pruner.is_made_of(checkpoint, profile, order)
    for name in found:  # as if lost
        artifact_path(bench, made, name).unlink(missing_ok=True)
    bench.pruner.restore(DENSE)
    bench.warn = ignore_warning
    bench.pruner.restore(made)
    assert all(torch.equal(layer.weight_OI, found[layer.name]) for layer in bench.weights.layers)


def ignore_warning(text: str) -> None:
    assert "computed again" in text


def test_curves_of_several_methods_are_read_layer_by_layer(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    plan = make_plan({"*.v_proj": {"method": "magnitude", "refit": False}}, Recipe(statistics="dense"))
    order = open_orders(bench, profile, CONFIG, DENSE)(plan)
    own, refit = (
        bench.curves.describe_layers(profile, recipe, ignore) for recipe in reversed(list_recipes(plan, CONFIG))
    )
    both = [a if a.kind == V else b for a, b in zip(own, refit, strict=True)]
    assert order == resolve(plan, both, CONFIG)
    assert order.zeros != resolve(plan, refit, CONFIG).zeros
