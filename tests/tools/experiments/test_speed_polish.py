"""What the benchmark of the polish times: two ways to the same gradient, and weights that are left as they were."""

import pytest
import torch

from tests.benches import same, snapshot
from tools.experiments import speed_polish
from tools.experiments.speed import Site
from tools.experiments.speed_polish import bench_polish, differentiate_whole
from tools.models.blocks import Blocks
from tools.models.readout import compute_hidden
from tools.polish.gradients import KL, Divergence
from tools.polish.survivors import Survivors


def test_the_weights_are_left_as_they_were(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = snapshot(site.bench), []
    whole = speed_polish.differentiate_whole

    def record(*given: object) -> None:
        zeros, weights = site.bench.count_zeros()
        seen.append(zeros / weights)
        whole(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(speed_polish, "differentiate_whole", record)
    assert [result.name for result in bench_polish(site)] == ["polish/autograd", "polish/forward"]
    assert seen == [0.5] * 3, "the warm-up and two rounds, each of a pruned model"
    assert same(snapshot(site.bench), before)
    assert not any(p.requires_grad or p.grad is not None for p in site.bench.model.parameters())


def test_both_take_the_same_gradient(site: Site) -> None:
    model, layers, windows_BT = site.bench.model, site.bench.layers, site.calibration_BT
    with torch.no_grad():
        dense_TD = compute_hidden(model, windows_BT[:1])[0]
    for layer in layers:
        layer.write(layer.weight_OI * (layer.weight_OI.abs() > layer.weight_OI.abs().median()))
    survivors = Survivors(layers)
    sums = Divergence(Blocks(model), survivors, windows_BT, {0: dense_TD}).differentiate([0])
    differentiate_whole(model, layers, windows_BT[0], dense_TD, 0)
    assert sums.pop(KL) > 0
    for layer in layers:
        whole_S = survivors.gather(layer.name, layer.parameter.grad)
        torch.testing.assert_close(sums[layer.name], whole_S, rtol=1e-3, atol=1e-4 * float(whole_S.abs().max()))
