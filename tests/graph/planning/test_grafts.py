"""Layers of two rounds in one plan: which can be had, at which budget, and what is made of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph.config import RunConfig
from graph.planning.brief import planner_messages
from graph.planning.budget import TokenBudget
from graph.planning.choose import weigh_in_bounds
from graph.planning.grafts import Grafts
from graph.planning.kept_orders import find_order, keep_order, read_order
from graph.planning.orders import Orders, describe_plan, hash_request, refuse_above_target
from graph.planning.plan import Plan
from graph.planning.prices import Price, price_drafts
from graph.planning.refinements import plan_refinements
from graph.planning.situation import Situation
from graph.reflecting.levers import name_levers
from graph.reflecting.rule import draw_lesson
from graph.state import State, Trial
from tests.benches import REFIT, SEQUENTIAL, WANDA, artifact_path, ignore, open_bench, plan
from tests.named import name_texts
from tests.situations import make_layers, make_situation, make_trial
from tests.tiny import tiny_settings
from tools.base.errors import ImpossiblePlan
from tools.instruments.functions import Draft, Round
from tools.instruments.probed import Probed
from tools.instruments.swap import swap
from tools.plans.allocate import Allocation
from tools.plans.budget import SAME_SPARSITY
from tools.plans.graft import Graft
from tools.plans.recipe import Recipe
from tools.plans.selectors import select_layers
from tools.plans.work_order import LayerOrder, WorkOrder, order_all, order_allocation
from tools.results.losses import compare_kl
from tools.workbench.bench import Workbench
from tools.workbench.checkpoints import Taken
from tools.workbench.store import DENSE, ArtifactStore

LAYERS = make_layers()
FIRST, SECOND = Recipe(curves="mask"), Recipe(curves="mask", statistics="sequential")
V = "self_attn.v_proj"


def make_layer_orders(name: str, recipe: Recipe, **zeros: int) -> dict[str, Taken]:
    """The layers of a checkpoint of that name, with 450 zeros each, but where a block has others."""
    return {
        x.name: Taken(
            LayerOrder(recipe=recipe.within_layers(), zeros=zeros.get(f"b{x.block}", 450), taken=name),
            "shared" if x.kind == "self_attn.q_proj" else f"{name} {x.name}",
        )
        for x in LAYERS
    }


TAKEN = {
    "1": make_layer_orders("1", FIRST),
    "2": make_layer_orders("2", SECOND, b0=460, b1=440),
    "3": make_layer_orders("3", FIRST),
}


def situate(**changes: Any) -> Situation:
    trials = [make_trial(n, "accept" if n == 1 else "rollback", 0.45, r) for n, r in ((1, FIRST), (2, SECOND))]
    trials.append(make_trial(3, "rollback", 0.45, FIRST))
    known = make_situation(*trials)
    return replace(known, **{"kept": ["1", "3", "2"], "read_taken": TAKEN.__getitem__} | changes)


def make_plan(selector: str, of: int = 2, rest: int = 1, **more: Any) -> Plan:
    return Plan(sparsity=0.45, graft=Graft(selector=selector, of=of, rest=rest), **more)


def test_a_graft_takes_layers_with_their_recipes_and_zeros() -> None:
    situation = situate()
    asked = make_plan("blocks 0-1")
    weighed = weigh_in_bounds(asked, situation)
    order = situation.orders.draft(weighed)
    for layer in LAYERS:
        source = "2" if layer.block < 2 else "1"
        assert order.layers[layer.name] == TAKEN[source][layer.name].order
    assert (order.sparsity, order.polish, order.multipliers) == (0.45, 0, {})
    assert order.line == describe_plan(asked) == "45.0% graft · blocks 0-1 of round 2, the rest of round 1"
    assert weighed.recipe == FIRST, "that of the rest, whatever the plan says"
    assert hash_request(asked) == hash_request(weighed) != hash_request(make_plan("blocks 0-1", 3))
    apart = order_all(FIRST, order.zeros, sparsity=0.45, predicted_kl=0.0)
    others = [situation.orders.draft(make_plan("blocks 0-1", 2, 3)), apart]
    assert len({order.id, *(other.id for other in others)}) == 3
    budget = TokenBudget(RunConfig(), 0, 100)
    assert budget.list_costs(weighed, order) == {}
    assert price_drafts([weighed], 64, situation, budget) == Price(64, 0, 64)
    assert situation.orders.list_unknown(weighed) == []


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (make_plan(V, 4), "the layers of round 4 are not at hand for a graft; those of rounds: 1, 2, 3"),
        (make_plan(V, 2, 2), "a graft is of two rounds, and not of 2 twice"),
        (make_plan("*.k_proj"), r"selector '\*\.k_proj' means no layer; layers are named like '.*'"),
        (make_plan("*"), "graft '\\*' is every layer, which is round 2 itself; name fewer"),
        (make_plan("*.q_proj"), r"those of '\*\.q_proj' are the same layers in rounds 2 and 1: this is round 1 itself"),
        (
            make_plan("*[nv]_proj"),
            r"all but those of '\*\[nv\]_proj' are the same layers in rounds 2 and 1: this is round 2 itself",
        ),
        (
            make_plan(V, expression="1+depth"),
            "a graft takes layers as they are; leave groups, adjustments and expression out",
        ),
        (
            make_plan("blocks 1"),
            r"blocks 1 of round 2, the rest of round 1 have 8,070 zeros together, 30 fewer \(-0.167%\) than the 8,100 "
            "of 45.00%; none may be missing, and 9 at most be more",
        ),
        (make_plan("blocks 0"), r"blocks 0 of .* 8,130 zeros together, 30 more \(\+0.167%\) than the 8,100 of 45.00%"),
    ],
)
def test_what_cannot_be_grafted_is_one_line(asked: Plan, sentence: str) -> None:
    with pytest.raises(ImpossiblePlan, match=f"^{sentence}"):
        situate().orders.draft(asked)


def test_as_many_zeros_as_the_plans_or_a_few_more() -> None:
    for zeros, fits in ((449, False), (450, True), (459, True), (460, False)):
        name = f"model.layers.0.{V}"
        taken = TAKEN | {"2": TAKEN["3"] | {name: Taken(LayerOrder(recipe=FIRST, zeros=zeros, taken="2"), "other")}}
        orders = situate(read_taken=taken.__getitem__).orders
        if fits:
            assert orders.draft(make_plan(V)).sparsity == pytest.approx(0.45 + (zeros - 450) / 18_000)
        else:
            with pytest.raises(ImpossiblePlan, match="zeros together"):
                orders.draft(make_plan(V))


def test_a_graft_has_the_zeros_that_it_has() -> None:
    """What its rounds have together is a whole number, which may be half a weight above the target."""
    config = RunConfig(target_sparsity=0.45)
    graft = make_plan(V)
    refuse_above_target(graft.model_copy(update={"sparsity": 0.45 + SAME_SPARSITY / 2}), config)
    for other, sparsity in ((graft, 0.45 + 2 * SAME_SPARSITY), (Plan(sparsity=0.4), 0.45 + SAME_SPARSITY / 2)):
        with pytest.raises(ValueError, match=r"is above the target; plan at most 0\.45"):
            refuse_above_target(other.model_copy(update={"sparsity": sparsity}), config)


def test_a_probe_that_prunes_takes_the_room_of_the_last_round_at_hand() -> None:
    budget = TokenBudget(RunConfig(), 0, 100)
    situation = situate(budget=budget)
    told = planner_messages(situation)[1].text
    assert "\nRounds at hand for `graft`: 1, 2, 3; a probe that prunes takes the place of round 2." in told
    assert "at hand" not in planner_messages(situate(kept=["1"]))[1].text, "a graft is of two"
    deleted = situate(budget=budget, gone=[situation.kept[-1]])
    assert deleted.list_at_hand().keys() == situation.list_at_hand().keys() - {2}, "a probe of an earlier round did"
    budget.probed.append(
        Probed(order="a", checkpoint="a", sparsity=0.45, tokens=64, losses={}, windows=[0], grafted=True)
    )
    assert situation.orders.draft(make_plan(V, 3))
    budget.probed.append(Probed(order="b", checkpoint="b", sparsity=0.45, tokens=64, losses={}, windows=[0]))
    with pytest.raises(ImpossiblePlan, match=r"^the layers of round 2 are not at hand for a graft; .* rounds: 1, 3$"):
        situation.orders.draft(make_plan(V))
    assert situation.orders.draft(make_plan(V, 3))


def test_it_is_kept_and_read_back(tmp_path: Path) -> None:
    store, asked = ArtifactStore(tmp_path / "artifacts"), make_plan("blocks 0-1")
    order = situate().orders.draft(asked)
    assert (
        read_order(store, keep_order(store, asked, order), Plan.model_validate_json(asked.model_dump_json())) == order
    )
    assert "graft" not in Plan(sparsity=0.45).model_dump() and "taken" not in str(order_all(
        FIRST, order.zeros, sparsity=0.45, predicted_kl=0.0
    ).model_dump())  # fmt: skip


def test_nothing_is_learnt_of_curves_and_the_rule_goes_on_from_its_recipe() -> None:
    grafted = make_trial(4, "accept", 0.45, FIRST).model_copy(update={"graft": make_plan(V).graft})
    shares = {layer.name: 0.45 for layer in LAYERS}
    moved = {layer.name: 0.4 + 0.1 * (layer.block % 2) for layer in LAYERS}
    assert name_levers(grafted, make_trial(1, "accept", 0.45, SECOND)) == "", "rounds are those of one run"
    assert draw_lesson("r", LAYERS, grafted, moved, make_trial(1, "accept", 0.45, FIRST), shares) is None
    after = draw_lesson("r", LAYERS, make_trial(5, "rollback", 0.45, FIRST), moved, grafted, shares)
    assert after is not None and after.selector == "*", "compared with nothing that it moved from"
    broken = grafted.model_copy(update={"broken": True, "verdict": "rollback"})
    assert make_situation(broken).broken == set()
    situation = replace(make_situation(grafted), accepted_plan=make_plan(V, recipe=FIRST))
    assert all(refined.graft is None for refined in plan_refinements(situation))


# Carried out


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Workbench:
    return open_bench(tiny_settings(tiny_llama), tmp_path / "run")


def make_rounds(bench: Workbench, profile: str, shared: Allocation) -> dict[str, dict[str, Tensor]]:
    """The weights of two rounds, by checkpoint."""
    weights = {}
    for recipe in (REFIT, SEQUENTIAL):
        checkpoint = bench.prune(profile, order_allocation(recipe, shared), ignore)
        weights[checkpoint] = {layer.name: layer.weight_OI.clone() for layer in bench.layers}
    return weights


def sit_down(bench: Workbench, profile: str, made: Sequence[str]) -> tuple[dict[int, Trial], Orders, Round]:
    """Rounds that made these checkpoints, and what a planner has who may graft their layers."""
    trials = {
        number: Trial(
            **{"iteration": number, "checkpoint": checkpoint, "sparsity": 0.45, "perplexity": 1.0, "kl": 0.1},
            **{"predicted_kl": 0.1, "verdict": "rollback", "recipe": REFIT},
        )
        for number, checkpoint in enumerate(made, 1)
    }
    layers, at_hand = bench.read_profile(profile).layers, dict(enumerate(made, 1))
    orders = Orders(RunConfig(), (), layers, grafts=Grafts(lambda: trials, bench.list_taken))

    def resolve(draft: Draft) -> WorkOrder:
        return orders.draft(orders.weigh(Plan.model_validate(draft.model_dump())))

    return trials, orders, Round(bench, profile, resolve, ignore, present=made[1], list_at_hand=lambda: at_hand)


def test_swaps_tell_what_each_named_text_gains(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    bench = open_bench(tiny_settings(tiny_llama, **name_texts(tmp_path)), tmp_path / "run")
    profile = bench.profile(ignore)
    made = list(make_rounds(bench, profile, plan(bench, profile, 0.45, WANDA)))
    *_, round_ = sit_down(bench, profile, made)
    swapped = swap(round_, ["*.v_proj"], 2, 1, whole=True)["swaps"]["*.v_proj"]
    own, rest = (bench.evaluate(x, "validation", profile, ignore) for x in (round_.probed[0].checkpoint or "", made[0]))
    for name in ("code", "prose"):
        change = compare_kl(own.take_text(name), rest.take_text(name))
        assert swapped["texts"][name]["kl_minus_rest"] == pytest.approx(list(change), rel=1e-3) and change[0]
    code, prose = (swapped["texts"][name]["kl_minus_rest"][0] for name in ("code", "prose"))
    assert swapped["kl_minus_rest"][0] == pytest.approx((3 * code + prose) / 4, rel=1e-2), "by their weights"


def test_grafted_layers_are_those_of_their_rounds_to_the_bit_though_they_be_lost(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    shared = plan(bench, profile, 0.45, WANDA)
    weights = make_rounds(bench, profile, shared)
    made, layers = list(weights), bench.read_profile(profile).layers
    trials, orders, round_ = sit_down(bench, profile, made)
    swapped = swap(round_, ["blocks 1", "*.v_proj", "*"], 2, 1)
    assert all(torch.equal(layer.weight_OI, weights[made[1]][layer.name]) for layer in bench.layers), "put back"
    assert [probed.grafted for probed in round_.probed] == [True], "blocks 1 of round 2 are all that it has of its own"
    found = swapped["swaps"]["*.v_proj"]
    losses = [bench.evaluate(x, "validation", profile, ignore) for x in (round_.probed[0].checkpoint, made[0])]
    change = compare_kl(*(x.take([0, 2]) for x in losses))
    assert found["kl_minus_rest"] == pytest.approx(list(change), rel=1e-3) and change[0] != 0
    assert (swapped["tokens"], found["sparsity"], found["probe"]) == (128, 0.45, 1)
    assert [bool(x.get("error")) for x in swapped["swaps"].values()] == [True, False, True]
    for of, rest, selector in ((2, 1, "*.v_proj"), (1, 2, "blocks 1 · *.down_proj")):
        asked = orders.weigh(make_plan(selector, of, rest))
        order = orders.draft(asked)
        grafted = bench.prune(profile, order, ignore)
        chosen = set(select_layers(selector, layers))
        expected = {x.name: weights[made[(of if x.name in chosen else rest) - 1]][x.name] for x in layers}
        assert all(torch.equal(layer.weight_OI, expected[layer.name]) for layer in bench.layers)
        assert bench.count_zeros()[0] == sum(shared.zeros.values())
        assert bench.is_made_of(grafted, profile, order) and not bench.is_made_of(made[rest - 1], profile, order)
        state = State(config=orders.config, profile=profile, plan=asked, trials=list(trials.values()), accepted=made[0])
        assert find_order(bench, state, ignore) == order, "though no artifact has it"
        again = bench.list_taken(grafted)
        assert {x.order.taken for x in again.values()} == set(made), "a graft of a graft goes back to what was pruned"
        for name in expected:  # as if lost
            for checkpoint in (grafted, made[0], made[1]):
                artifact_path(bench, checkpoint, name).unlink(missing_ok=True)
        bench.restore(DENSE)
        bench.warn = ignore_warning
        bench.restore(grafted)
        assert all(torch.equal(layer.weight_OI, expected[layer.name]) for layer in bench.layers)
        assert bench.restore(grafted) == []


def ignore_warning(text: str) -> None:
    assert "computed again" in text
