"""Pruned exactly and restored bit for bit, whatever was made before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.statistics.table
import tools.workbench.curves
import tools.workbench.layer_pruning
from billhook_kernels.guard import Pruned
from billhook_kernels.methods import prune_weight
from tests.benches import MASK, REFIT, SEQUENTIAL, WANDA, artifact_path, ignore, open_bench, plan, prune, same, snapshot
from tests.team import join_team
from tests.tiny import ARCHITECTURES, save_tiny_model, tiny_settings
from tools.base.errors import BrokenPlan, ImpossiblePlan
from tools.models.blocks import Blocks
from tools.plans.costs import count_in_order, list_order_costs
from tools.plans.mix import mix_questions
from tools.plans.recipe import Adjustment, Recipe, parse_recipe
from tools.plans.work_order import WorkOrder, order_allocation, prune_alone
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench
from tools.workbench.store import DENSE


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_pruned_exactly_and_restored_bit_for_bit(
    architecture: str, dtype: str, tmp_path: Path, workbench_closed: None
) -> None:
    model = save_tiny_model(tmp_path / "model", architecture)
    bench = open_bench(tiny_settings(model, dtype=dtype), tmp_path / "run")
    dense = snapshot(bench)
    profile = bench.profile(ignore)
    made = {}
    for recipe in (REFIT, MASK, WANDA):
        allocation = plan(bench, profile, 0.45, recipe)
        checkpoint = bench.pruner.prune(profile, order_allocation(recipe, allocation), ignore)
        made[checkpoint] = snapshot(bench)
        zeros, weights = bench.weights.count_zeros()
        assert zeros == round(0.45 * weights) == sum(allocation.zeros.values())
        for layer, share in zip(bench.weights.layers, bench.weights.sparsities(), strict=True):
            assert int((layer.weight_OI == 0).sum()) == allocation.zeros[layer.name]
            assert share == pytest.approx(allocation.zeros[layer.name] / layer.weight_OI.numel())
    assert len(made) == 3
    for checkpoint, bits in made.items():
        bench.pruner.restore(checkpoint)
        assert same(snapshot(bench), bits)
        bench.pruner.restore(DENSE)
        assert same(snapshot(bench), dense)
    names = {layer.name for layer in bench.weights.layers}
    for bits in made.values():  # nothing but the prunable layers is touched
        assert {k.removesuffix(".weight") for k in bits if not torch.equal(bits[k], dense[k])} <= names


def test_what_was_finished_before_a_layer_breaks_is_kept_and_the_rest_put_back(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    before, snapped = prune(bench, profile, 0.2, MASK), snapshot(bench)
    prune_layer, begun = tools.workbench.layer_pruning.prune_layer, 0

    def fail(*arguments: Any) -> Pruned:
        nonlocal begun
        begun += 1
        if begun == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return prune_layer(*arguments)

    monkeypatch.setattr(tools.workbench.layer_pruning, "prune_layer", fail)
    name = list(bench.weights.by_name)[4]
    with pytest.raises(BrokenPlan, match=rf"^pruning layer {name}: out of memory \(CUDA out of memory\.\)$"):
        prune(bench, profile, 0.45)
    assert not same(snapshot(bench), snapped), "it broke in the middle"
    assert len(bench.pruner.restore(before)) == 4
    assert same(snapshot(bench), snapped)
    assert prune(bench, profile, 0.45) and begun == 1 + len(bench.weights.layers), "four were read back"


def test_restoring_touches_only_what_differs(bench: Workbench, written: list[str]) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    first = bench.pruner.prune(profile, order_allocation(REFIT, allocation), ignore)
    names = list(allocation.zeros)
    allocation.zeros[names[2]] -= 10
    allocation.zeros[names[5]] += 10
    written.clear()
    second = bench.pruner.prune(profile, order_allocation(REFIT, allocation), ignore)
    assert sorted(written) == sorted([names[2], names[5]])
    written.clear()
    assert sorted(bench.pruner.restore(first)) == sorted([names[2], names[5]]) == sorted(written)
    assert bench.pruner.restore(first) == []
    assert sorted(bench.pruner.restore(second)) == sorted([names[2], names[5]])
    assert sorted(bench.pruner.restore(DENSE)) == sorted(names)


def test_sparsity_may_fall_as_well_as_rise(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    direct = prune(bench, profile, 0.3)
    weights = snapshot(bench)
    prune(bench, profile, 0.7)
    assert prune(bench, profile, 0.3) == direct
    assert same(snapshot(bench), weights)


def test_protected_layers_stay_dense(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    before = snapshot(bench)
    allocation = plan(bench, profile, 0.4, REFIT, Adjustment(selector="*.v_proj", action="protect"))
    checkpoint = bench.pruner.prune(profile, order_allocation(REFIT, allocation), ignore)
    after = snapshot(bench)
    for name, record in bench.pruner.read_checkpoint(checkpoint).items():
        protected = name.endswith("v_proj")
        assert (record.artifact == DENSE) == protected
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) == protected


def test_progress_counts_every_layer(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    seen: list[tuple[str, int, int]] = []
    bench.pruner.prune(profile, order_allocation(REFIT, plan(bench, profile, 0.4)), lambda *step: seen.append(step))
    assert seen == [("prune", i, 14) for i in range(15)]


def test_what_was_made_before_is_read_back(bench: Workbench, computed: list[tuple[str, int]]) -> None:
    profile = bench.profile(ignore)
    first = prune(bench, profile, 0.4)
    assert len(computed) == 14
    weights = snapshot(bench)
    prune(bench, profile, 0.5, MASK)
    assert prune(bench, profile, 0.4) == first
    assert len(computed) == 28
    settings, directory = bench.settings, bench.directory
    close_workbench()
    again = open_bench(settings, directory)
    assert prune(again, profile, 0.4) == first
    assert len(computed) == 28
    assert same(snapshot(again), weights)


def test_a_torn_index_line_costs_one_layer(bench: Workbench, computed: list[tuple[str, int]]) -> None:
    profile = bench.profile(ignore)
    first = prune(bench, profile, 0.4)
    index = bench.store.directory / "index.jsonl"
    index.write_text(index.read_text()[:-20])
    computed.clear()
    assert prune(bench, profile, 0.4) == first
    assert len(computed) == 1
    assert prune(bench, profile, 0.4) == first
    assert len(computed) == 1


@pytest.mark.parametrize(
    "line", ["[]", "3", '{"key": 1}', '{"key": [], "artifact": "a"}', '{"key": "k", "artifact": "gone"}']
)
def test_an_index_line_that_is_nonsense_is_ignored(bench: Workbench, line: str) -> None:
    profile = bench.profile(ignore)
    first = prune(bench, profile, 0.4)
    with (bench.store.directory / "index.jsonl").open("a") as file:
        file.write("\n" + line + "\n")
    assert prune(bench, profile, 0.4) == first


def test_forgotten_checkpoints_lose_their_files_but_not_their_recipe(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    first = prune(bench, profile, 0.3)
    first_weights = snapshot(bench)
    second = prune(bench, profile, 0.4)
    second_weights = snapshot(bench)
    shared = {r.artifact for r in bench.pruner.read_checkpoint(first).values()} & {
        r.artifact for r in bench.pruner.read_checkpoint(second).values()
    }
    bench.pruner.forget([second, DENSE])
    for name in bench.weights.by_name:
        record = bench.pruner.read_checkpoint(first)[name]
        assert artifact_path(bench, first, name).is_file() == (record.artifact in shared)
        assert record.artifact == DENSE or artifact_path(bench, second, name).is_file()
    bench.pruner.restore(DENSE)
    bench.pruner.restore(second)
    assert same(snapshot(bench), second_weights)
    assert warnings == []
    bench.pruner.restore(first)
    assert same(snapshot(bench), first_weights)
    gone = sum(a not in (*shared, DENSE) for a in {r.artifact for r in bench.pruner.read_checkpoint(first).values()})
    assert warnings == [f"{gone} layers are no longer on disk and are computed again"]


def test_steps_of_the_method_refit_make_other_layers_by_the_same_curves(
    bench: Workbench, computed: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    five, three = (
        bench.pruner.prune(profile, order_allocation(parse_recipe(label), allocation), ignore)
        for label in ("refit", "refit3")
    )
    assert five != three
    assert len(computed) == 2 * len(bench.weights.layers)
    assert bench.pruner.prune(profile, order_allocation(parse_recipe("refit3:owl"), allocation), ignore) == three
    assert len(computed) == 2 * len(bench.weights.layers)
    assert bench.curves.has_layers(profile, Recipe(curves="mask")) and not bench.curves.has_layers(profile, Recipe())
    bench.curves.describe_layers(profile, Recipe(), ignore)
    assert bench.curves.has_layers(profile, Recipe(refit_steps=3)) and not bench.curves.has_layers(
        profile, Recipe(gamma="clipped")
    )
    monkeypatch.setattr(tools.workbench.curves, "measure_kappa", pytest.fail)
    assert bench.curves.describe_layers(profile, Recipe(refit_steps=3), ignore) == bench.curves.describe_layers(
        profile, Recipe(), ignore
    )


def test_the_method_refit_is_made_once_whatever_the_recipe_says_of_a_refit(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    first = bench.pruner.prune(profile, order_allocation(Recipe(method="refit"), allocation), ignore)
    assert (
        bench.pruner.prune(profile, order_allocation(Recipe(method="refit", refit=False), allocation), ignore) == first
    )


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "refit"])
def test_a_pattern_holds_in_every_group(bench: Workbench, method: str) -> None:
    profile = bench.profile(ignore)
    recipe = parse_recipe(f"{method}:uniform").model_copy(update={"pattern": "2:4"})
    prune(bench, profile, 0.5, recipe)
    for layer in bench.weights.layers:
        assert bool(((layer.weight_OI == 0).reshape(-1, 4).sum(1) == 2).all())


def test_a_damping_that_had_to_grow_is_told(
    bench: Workbench, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strain(*arguments: Any, **options: Any) -> Pruned:
        return prune_weight(*arguments, **options)._replace(damping=0.1)

    monkeypatch.setattr(tools.statistics.table, "prune_weight", strain)
    prune(bench, bench.profile(ignore), 0.4)
    assert warnings[0] == (
        f"layer {bench.weights.layers[0].name} needed damping 0.1 instead of 0.01: its inputs are singular"
    )


def test_in_order_the_first_block_is_as_ever_and_the_others_see_pruned_inputs(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    plain = bench.pruner.prune(profile, order_allocation(REFIT, allocation), ignore)
    weights = {layer.name: layer.weight_OI.clone() for layer in bench.weights.layers}
    ordered = bench.pruner.prune(profile, order_allocation(SEQUENTIAL, allocation), ignore)
    for layer in bench.weights.layers:
        change = (layer.weight_OI - weights[layer.name]).norm() / weights[layer.name].norm()
        assert (float(change) < 1e-3) is (layer.block == 0)
    assert bench.pruner.planned_sparsity(plain) == bench.pruner.planned_sparsity(ordered)
    assert bench.weights.count_zeros()[0] == sum(allocation.zeros.values())


def test_in_order_interrupted_is_as_uninterrupted(
    bench: Workbench, computed: list[tuple[str, int]], tmp_path: Path
) -> None:
    profile = bench.profile(ignore)
    index = bench.store.directory / "index.jsonl"
    before = len(index.read_text().splitlines())
    allocation = plan(bench, profile, 0.4)
    checkpoint = bench.pruner.prune(profile, order_allocation(SEQUENTIAL, allocation), ignore)
    whole, count = snapshot(bench), len(computed)
    lines = index.read_text().splitlines()
    for kept in (3, 10, len(lines) - before):  # as if killed in the first block, in the second, and after the last
        index.write_text("\n".join(lines[: before + kept]))
        computed.clear()
        bench.pruner.restore(DENSE)
        assert bench.pruner.prune(profile, order_allocation(SEQUENTIAL, allocation), ignore) == checkpoint
        assert same(snapshot(bench), whole)
        assert len(computed) <= count - kept


# --- layers of one order by several recipes -------------------------------------------------------------------------


def mix(order: WorkOrder, *others: tuple[WorkOrder, Callable[[str], bool]]) -> WorkOrder:
    """An order with those of its layers taken from others that these are to have."""
    layers = dict(order.layers)
    for other, chosen in others:
        layers |= {name: layer for name, layer in other.layers.items() if chosen(name)}
    return order.model_copy(update={"layers": layers})


def artifacts(bench: Workbench, checkpoint: str) -> dict[str, str]:
    return {name: record.artifact for name, record in bench.pruner.read_checkpoint(checkpoint).items()}


@pytest.mark.parametrize("workers", [False, True])
def test_layers_of_several_recipes_come_out_as_each_recipe_makes_them(bench: Workbench, workers: bool) -> None:
    """Sequential statistics: all of block 0 and the attention of block 1, behind the pruned block 0."""
    profile = bench.profile(ignore, masks_only=True)
    allocation = plan(bench, profile, 0.4)
    refit, mask, ordered = (order_allocation(recipe, allocation) for recipe in (REFIT, MASK, SEQUENTIAL))
    by = {x.name: ordered if x.block == 0 or "self_attn" in x.name else refit for x in bench.weights.layers}
    by["model.layers.1.self_attn.k_proj"] = mask
    order = mix(refit, (mask, lambda name: by[name] is mask), (ordered, lambda name: by[name] is ordered))
    if workers:
        join_team(bench)
    mixed = bench.pruner.prune(profile, order, ignore)
    bits, found = snapshot(bench), artifacts(bench, mixed)
    (bench.store.directory / "index.jsonl").unlink()
    for each in (refit, mask, ordered):
        made = artifacts(bench, bench.pruner.prune(profile, each, ignore))
        weights = snapshot(bench)
        for name in (name for name in by if by[name] is each):
            assert found[name] == made[name]
            assert torch.equal(bits[f"{name}.weight"], weights[f"{name}.weight"])
        assert bench.pruner.is_made_of(mixed, profile, order) and not bench.pruner.is_made_of(mixed, profile, each)
    assert bench.pruner.restore(mixed) and same(snapshot(bench), bits)
    for kept in (0, 5, 12):  # as if killed
        index = bench.store.directory / "index.jsonl"
        index.write_text("\n".join(index.read_text().splitlines()[: -(kept or 1)]))
        bench.pruner.restore(DENSE)
        assert bench.pruner.prune(profile, order, ignore) == mixed and same(snapshot(bench), bits)


def test_in_order_layers_are_behind_those_that_were_pruned_by_other_statistics(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    labels = ("magnitude", "magnitude~sequential", "sparsegpt~sequential")
    plain, first, behind = (order_allocation(parse_recipe(label), allocation) for label in labels)
    last = {layer.name for layer in bench.weights.layers if layer.block == 1}
    mixed = bench.pruner.prune(profile, mix(plain, (behind, last.__contains__)), ignore)
    again = bench.pruner.prune(profile, mix(first, (behind, last.__contains__)), ignore)
    assert artifacts(bench, mixed) == artifacts(bench, again), "magnitudes know of no statistics"
    alone = artifacts(bench, bench.pruner.prune(profile, behind, ignore))
    assert all(alone[name] != artifact for name, artifact in artifacts(bench, mixed).items())


def test_in_order_a_layer_is_pruned_by_the_same_sums_whatever_the_others_are(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    allocation, name = plan(bench, profile, 0.4), "model.layers.0.self_attn.v_proj"
    labels = ("wanda", "refit~sequential")
    orders = [order_allocation(parse_recipe(label), allocation) for label in labels]
    seen: list[torch.Tensor] = []
    prune_layer = tools.workbench.layer_pruning.prune_layer

    def see(recipe: Recipe, dense_OI: torch.Tensor, statistics: Any, zeros: int) -> Pruned:
        if recipe.method == "wanda" and zeros == allocation.zeros[name] and dense_OI.equal(bench.weights.dense[name]):
            seen.append(statistics.mean_square_I.clone())
        return prune_layer(recipe, dense_OI, statistics, zeros)

    monkeypatch.setattr(tools.workbench.layer_pruning, "prune_layer", see)
    for order in (orders[0], mix(orders[1], (orders[0], lambda n: n == name))):
        (bench.store.directory / "index.jsonl").write_text("")
        bench.pruner.prune(profile, order, ignore)
    assert len(seen) == 2 and torch.equal(*seen)


def test_in_order_there_is_one_text(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    texts = (SEQUENTIAL.model_copy(update={"mix": mix}) for mix in (mix_questions(0.5), ()))
    half, run = (order_allocation(recipe, allocation) for recipe in texts)
    with pytest.raises(ImpossiblePlan) as refusal:
        bench.pruner.prune(profile, mix(run, (half, lambda name: name == bench.weights.layers[0].name)), ignore)
    assert str(refusal.value) == (
        "statistics behind pruned predecessors in one round are of one calibration text, and not of '~half' and 'run'"
    )


@pytest.mark.parametrize(
    "label", ["magnitude", "wanda", "two-sided+refit", "alps", "sparsegpt", "two-sided-obs", "refit"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_put_in_from_memory_is_what_its_artifact_stands_for(
    label: str, dtype: str, tiny_llama: Path, tmp_path: Path, workbench_closed: None
) -> None:
    bench = open_bench(tiny_settings(tiny_llama, dtype=dtype), tmp_path / "run")
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.5, parse_recipe(label))
    bits = snapshot(bench)
    bench.pruner.restore(DENSE)
    bench.pruner.restore(checkpoint)
    assert same(snapshot(bench), bits)


def test_in_order_some_layers_alone_take_the_text_no_further_than_the_last_of_them(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    layers = bench.profiles.read(profile).layers
    whole = order_allocation(SEQUENTIAL, plan(bench, profile, 0.5, SEQUENTIAL))
    ran, run = set[int](), Blocks.run

    def see(self: Blocks, ids_T: Any, block: int, *more: Any) -> Any:
        ran.add(block)
        return run(self, ids_T, block, *more)

    monkeypatch.setattr(Blocks, "run", see)
    for selector, passed, blocks in (("blocks 0", 0.5, {0}), ("blocks 1", 1.0, {0, 1})):
        order = prune_alone(whole, selector, layers)
        assert order.passed == passed
        ran.clear()
        bench.pruner.prune(profile, order, ignore)
        assert ran == blocks
    half = list_order_costs(prune_alone(whole, "blocks 0", layers), bench.settings)
    both = list_order_costs(whole, bench.settings)
    assert 2 * sum(half.values()) == sum(both.values()) == count_in_order(["sequential"], bench.settings)
    assert prune_alone(order_allocation(MASK, plan(bench, profile, 0.5, MASK)), "blocks 0", layers).passed == 1
