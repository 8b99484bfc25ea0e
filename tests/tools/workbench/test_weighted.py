"""Recipes whose tokens weigh unevenly: measured once, kept, and the same by whoever prunes by them."""

from pathlib import Path

import pytest
import torch

from tests.benches import ignore, open_bench, plan, prune, same, snapshot
from tests.team import join_team
from tests.tiny import make_tiny_model, save_tiny_model, tiny_settings
from tests.tools.workbench.test_stages import record_moments, record_statistics
from tools.base.errors import ImpossiblePlan
from tools.plans.recipe import parse_recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench
from tools.workbench.store import DENSE

LABELS = ("refit~weighted", "refit~weighted~sequential", "refit~weighted~stages", "two-sided+refit~weighted")
"""With the curves of the profile."""


@pytest.mark.parametrize("masks_only", [False, True])
def test_workers_and_interruptions_come_to_the_same_bits(
    bench: Workbench, computed: list[tuple[str, int]], masks_only: bool
) -> None:
    profile = bench.profile(ignore, masks_only=masks_only)
    index = bench.store.directory / "index.jsonl"
    before, made, bits = index.read_text(), [], []
    for label in LABELS:
        computed.clear()
        made.append(prune(bench, profile, 0.5, parse_recipe(f"{label}:kappa-mask")))
        bits.append(snapshot(bench))
        assert len(computed) == len(bench.layers) and bench.count_zeros()[0] == round(0.5 * bench.count_zeros()[1])
    assert len(set(made)) == len(LABELS)
    lines = index.read_text().removeprefix(before).splitlines()
    join_team(bench)
    for kept in (0, 1, 3):  # as if killed before token weights, among these, and among second moments
        index.write_text(before + "\n".join(lines[: kept + 1]))
        for label, checkpoint, weights in zip(LABELS, made, bits, strict=True):
            assert prune(bench, profile, 0.5, parse_recipe(f"{label}:kappa-mask")) == checkpoint
            assert same(snapshot(bench), weights)


def test_weights_are_measured_once_and_mean_squares_stay_even(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    steps: list[str] = []
    recipe = parse_recipe("two-sided+refit~weighted:kappa-mask")
    seen = record_statistics(monkeypatch)
    order = order_allocation(recipe, plan(bench, profile, 0.5, recipe))
    for _ in range(2):
        bench.prune(profile, order, lambda name, done, total: steps.append(name))
    assert list(dict.fromkeys(steps)) == ["token weights", "weighted second moments", "prune"]
    assert steps.count("token weights") == 3  # two blocks, and done
    even = [bench.profiles.find_statistics(profile, name, parse_recipe("refit")) for name in bench.by_name]
    for ours, theirs in zip(seen, even, strict=True):
        assert torch.equal(ours.mean_square_I, theirs.mean_square_I), "the mask is still the method's own"
        assert not torch.allclose(ours.moment_II, theirs.moment_II)


@pytest.mark.parametrize("statistics", ["sequential", "stages"])
def test_behind_pruned_predecessors_tokens_weigh_as_in_the_dense_model(
    statistics: str, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, profile = record_statistics(monkeypatch), bench.profile(ignore)
    prune(bench, profile, 0.5, parse_recipe(f"refit~weighted~{statistics}:kappa-mask"))
    reference = make_tiny_model("llama").double()
    name = "model.layers.1.mlp.down_proj"
    for layer in bench.layers:
        if layer.block == 0 or (statistics == "stages" and layer.name != name):
            reference.get_submodule(layer.name).weight.data.copy_(layer.weight_OI)
    weights = bench.profiles.read_token_weights(profile, 1)[name]
    modules, windows = {"down": reference.get_submodule(name)}, bench.windows.calibration
    expected_II = record_moments(reference, modules, windows, weights)["down"]
    torch.testing.assert_close(seen[-1].moment_II.double(), expected_II, rtol=1e-4, atol=1e-5)
    assert float(weights.double().mean()) == pytest.approx(1) and weights.shape == windows.shape


def test_layers_of_one_order_may_weigh_tokens_or_not(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    weighted, even = (
        order_allocation(parse_recipe(label), allocation) for label in ("refit~weighted~stages", "refit~stages")
    )
    layers = {name: (weighted if "gate" in name else even).layers[name] for name in even.layers}
    bench.prune(profile, even.model_copy(update={"layers": layers}), ignore)
    mixed = {name: layer.weight_OI.clone() for name, layer in bench.by_name.items()}
    bench.prune(profile, even, ignore)
    first = [name for name in mixed if name.startswith("model.layers.0") and "down" not in name]
    assert all(torch.equal(mixed[name], bench.by_name[name].weight_OI) == ("gate" not in name) for name in first)


def test_curves_of_a_method_are_those_of_its_own_weights(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    plain, weighted = (
        [layer.kappa for layer in bench.describe_layers(profile, parse_recipe(label), ignore)]
        for label in ("refit:kappa", "refit~weighted:kappa")
    )
    assert plain != weighted
    bench.restore(DENSE)


def test_mixtures_are_refused_in_one_line(tmp_path: Path, workbench_closed: None) -> None:
    settings = tiny_settings(save_tiny_model(tmp_path / "model", "qwen3_moe"))
    bench = open_bench(settings, tmp_path / "run", lambda text: None)
    profile = bench.profile(ignore)
    said = "^tokens are not weighted in mixtures of experts, each of which reads other ones; leave tokens even$"
    with pytest.raises(ImpossiblePlan, match=said):
        prune(bench, profile, 0.4, parse_recipe("refit~weighted:kappa-mask"))
    with pytest.raises(ImpossiblePlan, match=said):
        bench.describe_layers(profile, parse_recipe("refit~weighted:kappa"), ignore)
    prune(bench, profile, 0.4, parse_recipe("two-sided~weighted:kappa-mask"))  # which has no use for them
