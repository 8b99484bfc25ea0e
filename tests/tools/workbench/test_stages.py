"""Statistics within blocks, stage by stage, beside a plain loop in float64; whoever collects them, and when."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tools.workbench.layer_pruning
from billhook_kernels.guard import Pruned
from billhook_kernels.methods import LayerStatistics
from tests.benches import REFIT, SEQUENTIAL, ignore, open_bench, plan, prune, same, snapshot
from tests.team import join_team
from tests.tiny import MIXTURES, make_tiny_model, save_tiny_model, tiny_settings
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import order_allocation
from tools.statistics.moments import list_stages
from tools.statistics.walk import Walk
from tools.statistics.walks import Walks
from tools.workbench.bench import Workbench
from tools.workbench.store import DENSE

STAGES = Recipe(statistics="stages")
PROJECTIONS = [
    *(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]),
    *(["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]),
]
EXPERTS = [f"mlp.experts.{number}" for number in range(4)]
FOUND = {
    "llama": PROJECTIONS,
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        *(["self_attn.out_proj"], ["fc1"], ["fc2"]),
    ],
    "qwen3_moe": [
        *PROJECTIONS[:2],
        [f"{expert}.{name}" for expert in EXPERTS for name in ("gate_proj", "up_proj")],
        [f"{expert}.down_proj" for expert in EXPERTS],
    ],
}
FOUND |= {"qwen3": PROJECTIONS, "gemma3": PROJECTIONS, "mixtral": FOUND["qwen3_moe"], "gpt_oss": FOUND["qwen3_moe"]}


@pytest.mark.parametrize("architecture", FOUND)
def test_the_stages_of_a_block_are_those_that_it_runs_in(architecture: str, tmp_path: Path) -> None:
    model = make_tiny_model(architecture)
    layers, windows_BT = find_layers(model), torch.arange(3 * 24).view(3, 24)
    walks = Walks(Blocks(model), layers, windows_BT, 1, 0, tmp_path)
    for block in (1, 0):
        stages = walks.stages((1, 3), Walk(0, "run"), block)
        at = next(layer.name.removesuffix(layer.kind) for layer in layers if layer.block == block and not layer.pool)
        assert [sorted(stage) for stage in stages] == [
            [f"{at}{x}" for x in sorted(stage)] for stage in FOUND[architecture]
        ]


def test_experts_that_were_sent_nothing_stand_with_their_fellows() -> None:
    layers = [layer for layer in find_layers(make_tiny_model("qwen3_moe")) if layer.block == 0]
    at = "model.layers.0.mlp.experts"
    group = {f"{at}.2.gate_proj": f"{at}.2.gate_proj", f"{at}.2.up_proj": f"{at}.2.gate_proj"}
    rest = [layer.name for layer in layers if "experts" not in layer.name or "down" in layer.name]
    gates, last = list_stages(layers, group)
    assert sorted(gates) == sorted(layer.name for layer in layers if layer.name not in rest) and last == rest


def record_moments(model: Any, modules: dict[str, Any], windows_BT: Tensor) -> dict[str, Tensor]:
    """Mean of x x^T of what each layer reads, token by token in float64."""
    moments = {name: torch.zeros((), dtype=torch.float64) for name in modules}

    def see(name: str, x_TI: Tensor) -> None:
        for x_I in x_TI.double():
            moments[name] = moments[name] + torch.outer(x_I, x_I)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0][0]))
        for name, module in modules.items()
    ]
    for window in range(len(windows_BT)):
        model(input_ids=windows_BT[window : window + 1])
    for hook in hooks:
        hook.remove()
    return {name: total / windows_BT.numel() for name, total in moments.items()}


def record_statistics(monkeypatch: pytest.MonkeyPatch) -> list[LayerStatistics]:
    """What layers are pruned by from now on, in turn."""
    seen: list[LayerStatistics] = []
    prune_layer = tools.workbench.layer_pruning.prune_layer

    def see(recipe: Recipe, dense_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Pruned:
        seen.append(statistics)
        return prune_layer(recipe, dense_OI, statistics, zeros)

    monkeypatch.setattr(tools.workbench.layer_pruning, "prune_layer", see)
    return seen


def test_every_stage_is_pruned_by_what_it_reads_behind_all_that_is_pruned_before_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = record_statistics(monkeypatch)
    prune(bench, bench.profile(ignore), 0.5, STAGES)
    reference = make_tiny_model("llama").double()
    names = [f"model.layers.{block}.{kind}" for block in (0, 1) for stage in PROJECTIONS for kind in stage]
    by_name = dict(zip(names, seen, strict=True))
    for block in (0, 1):
        for stage in PROJECTIONS:
            modules = {kind: reference.get_submodule(f"model.layers.{block}.{kind}") for kind in stage}
            moments = record_moments(reference, modules, bench.windows.calibration)
            for kind, module in modules.items():
                name = f"model.layers.{block}.{kind}"
                ours = by_name[name]
                torch.testing.assert_close(ours.moment_II.double(), moments[kind], rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(ours.mean_square_I.double(), moments[kind].diagonal(), rtol=1e-4, atol=1e-6)
                module.weight.data.copy_(bench.by_name[name].weight_OI)
    assert bench.count_zeros()[0] == round(0.5 * bench.count_zeros()[1])


def test_the_first_stage_is_as_sequential_statistics_have_it_and_the_others_are_not(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    made = {}
    for recipe in (SEQUENTIAL, STAGES):
        checkpoint = bench.prune(profile, order_allocation(recipe, allocation), ignore)
        made[recipe] = {name: record.artifact for name, record in bench.read_checkpoint(checkpoint).items()}
    alike = {name for name, artifact in made[SEQUENTIAL].items() if made[STAGES][name] == artifact}
    assert alike == {f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"}


@pytest.mark.parametrize("workers", [False, True])
def test_stages_interrupted_or_by_workers_come_to_the_same_bits(
    bench: Workbench, computed: list[tuple[str, int]], workers: bool
) -> None:
    profile = bench.profile(ignore)
    order = order_allocation(STAGES, plan(bench, profile, 0.4))
    index = bench.store.directory / "index.jsonl"
    before = index.read_text()
    checkpoint = bench.prune(profile, order, ignore)
    whole, lines = snapshot(bench), index.read_text().removeprefix(before).splitlines()
    assert len(computed) == len(bench.layers) == sum(map(bool, lines))
    if workers:
        join_team(bench)
    for kept in (0, 1, 4, 6, 7, 13):  # as if killed within a stage, after one, and after a block
        index.write_text(before + "\n".join(lines[: kept + 1]))
        computed.clear()
        bench.restore(DENSE)
        assert bench.prune(profile, order, ignore) == checkpoint
        assert same(snapshot(bench), whole)
        assert len(computed) == len(bench.layers) - kept


def test_masks_alone_take_mean_squares_stage_by_stage(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_statistics(monkeypatch)
    profile = bench.profile(ignore, masks_only=True)
    prune(bench, profile, 0.5, parse_recipe("wanda~stages:uniform"))
    assert len(seen) == len(bench.layers) and all(statistics.second_moment_II is None for statistics in seen)


def test_layers_of_other_statistics_are_pruned_before_the_stages_of_their_block(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    orders = [order_allocation(recipe, allocation) for recipe in (STAGES, SEQUENTIAL, REFIT)]
    kinds = {"o_proj": orders[1], "gate_proj": orders[2]}
    layers = {name: kinds.get(name.rpartition(".")[2], orders[0]).layers[name] for name in orders[0].layers}
    mixed = orders[0].model_copy(update={"layers": layers})
    seen = record_statistics(monkeypatch)
    checkpoint = bench.prune(profile, mixed, ignore)
    whole = snapshot(bench)
    ours = {name: layer.weight_OI.clone() for name, layer in bench.by_name.items()}
    reference, last = make_tiny_model("llama").double(), "model.layers.0.mlp.down_proj"
    for name, weight_OI in ours.items():
        if name.startswith("model.layers.0.") and name != last:
            reference.get_submodule(name).weight.data.copy_(weight_OI)
    modules = {"down": reference.get_submodule(last)}
    moment_II = record_moments(reference, modules, bench.windows.calibration)["down"]
    found = seen[2 + 1 + 4]  # behind both gates, o of the first block, then its q, k, v and up
    torch.testing.assert_close(found.moment_II.double(), moment_II, rtol=1e-4, atol=1e-6)
    assert bench.is_made_of(checkpoint, profile, mixed) and not bench.is_made_of(checkpoint, profile, orders[0])
    bench.restore(DENSE)
    assert bench.prune(profile, mixed, ignore) == checkpoint and same(snapshot(bench), whole)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_are_pruned_stage_by_stage_and_routers_stay(
    architecture: str, tmp_path: Path, workbench_closed: None
) -> None:
    settings = tiny_settings(save_tiny_model(tmp_path / "model", architecture), calibration_windows=6)
    bench = open_bench(settings, tmp_path / "run", lambda text: None)
    dense, profile = snapshot(bench), bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.45, parse_recipe("refit~stages:kappa-mask"))
    weights = sum(layer.weight_OI.numel() for layer in bench.layers)
    assert bench.count_zeros() == (round(0.45 * weights), weights)
    after = snapshot(bench)
    routers = [name for name in dense if "router" in name or name.endswith("mlp.gate.weight")]
    assert routers and all(torch.equal(after[name], dense[name]) for name in routers)
    index = bench.store.directory / "index.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join(lines[:-3]))  # as if killed among the experts of the last block
    bench.restore(DENSE)
    assert prune(bench, profile, 0.45, parse_recipe("refit~stages:kappa-mask")) == checkpoint
    assert same(snapshot(bench), after)
