"""What the benchmarks of statistics time."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tools.statistics.pruned
from billhook_kernels.methods import prune_levels, prune_weight
from tests.tiny import make_tiny_model
from tools.base.progress import ignore_progress
from tools.experiments.speed import UPDATED, Site
from tools.experiments.speed_statistics import back_propagate, bench_kappa_of_method, bench_profile, bench_wanda
from tools.models.layers import find_layers
from tools.plans.work_order import order_allocation
from tools.workbench.store import DENSE


def test_curves_and_pruning_are_made_anew_every_round(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, curves = [], []

    def one(method: str, *arguments: Any, **options: Any) -> Any:
        pruned.append((method, options["refit"]))
        return prune_weight(method, *arguments, **options)

    def levels(method: str, *arguments: Any, **options: Any) -> Any:
        curves.append((method, options["refit"]))
        return prune_levels(method, *arguments, **options)

    monkeypatch.setattr(tools.statistics.pruned, "prune_weight", one)
    monkeypatch.setattr(tools.statistics.pruned, "prune_levels", levels)
    bench_kappa_of_method(site)
    assert pruned == curves == [("refit", False)] * (1 + site.settings.rounds) * len(site.bench.layers)


def test_dense_weights_are_what_statistics_are_taken_of(site: Site) -> None:
    allocation = site.share_out(0.5)
    site.bench.prune(site.profile, order_allocation(UPDATED, allocation), ignore_progress)
    bench_wanda(site)
    assert set(site.bench.installed.values()) == {DENSE}
    site.bench.prune(site.profile, order_allocation(UPDATED, allocation), ignore_progress)
    bench_profile(site)
    assert set(site.bench.installed.values()) == {DENSE}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bare_back_propagation(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(architecture)
    layers, windows = find_layers(model), torch.arange(48).view(2, 24)
    gradients: list[tuple[Tensor, ...]] = []
    grad = torch.autograd.grad

    def keep(*arguments: Any, **options: Any) -> Any:
        gradients.append(grad(*arguments, **options))
        return gradients[-1]

    monkeypatch.setattr(torch.autograd, "grad", keep)
    back_propagate(model, layers, windows)
    assert [[g.shape for g in some] for some in gradients] == [[layer.stored_weight.shape for layer in layers]] * 2
    assert all(float(g.abs().max()) > 0 for some in gradients for g in some)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(IndexError):
        back_propagate(model, layers, windows + 10_000)
    assert not any(p.requires_grad for p in model.parameters())
