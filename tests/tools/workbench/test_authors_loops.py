"""Wanda and SparseGPT behind pruned predecessors, beside the loops of their authors written out in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.benches import ignore
from tests.team import join_team
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import order_all
from tools.workbench.bench import Workbench

SHARE = 0.4


def collect_moments(model: Any, layers: dict[str, torch.nn.Module], windows_BT: Tensor) -> dict[str, Tensor]:
    """Sum of x x^T of what each layer reads, float64, in one forward of the model as it is."""
    moments: dict[str, Tensor] = {}

    def add(name: str, x_TI: Tensor) -> None:
        moments[name] = moments.get(name, 0) + x_TI.double().T @ x_TI.double()

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for ids_T in windows_BT:
            model(ids_T[None])
    for handle in handles:
        handle.remove()
    return moments


def choose_rows(score_OI: Tensor) -> Tensor:
    """Wanda: the lowest of each row go, int(inputs x share) of them."""
    goes = torch.zeros_like(score_OI, dtype=torch.bool)
    lowest = score_OI.sort(dim=-1, stable=True).indices[:, : int(score_OI.shape[1] * SHARE)]
    return goes.scatter_(1, lowest, True)


def prune_as_sparsegpt(weight_OI: Tensor, moment_II: Tensor) -> Tensor:
    """`fasterprune`, for layers of no more than 128 inputs, which are one block of columns.

    Rows that it leaves worse than its mask alone are those of the mask: Billhook's one addition.
    """
    w_OI = weight_OI.double().clone()
    damped_II = moment_II + 0.01 * moment_II.diagonal().mean() * torch.eye(len(moment_II))
    factor_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
    score = (w_OI / factor_II.diagonal()) ** 2
    goes_OI = score <= score.flatten().sort().values[round(score.numel() * SHARE) - 1]
    for i in range(len(moment_II)):
        kept_O = w_OI[:, i].where(~goes_OI[:, i], 0)
        error_O = (w_OI[:, i] - kept_O) / factor_II[i, i]
        w_OI[:, i:] -= error_O[:, None] * factor_II[i, i:]
        w_OI[:, i] = kept_O
    masked_OI = weight_OI.double().masked_fill(goes_OI, 0)
    errors = [((x_OI - weight_OI) @ moment_II * (x_OI - weight_OI)).sum(1) for x_OI in (w_OI, masked_OI)]
    return torch.where((errors[0] > errors[1])[:, None], masked_OI, w_OI)


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("label", ["wanda:uniform", "sparsegpt:uniform"])
def test_blocks_are_pruned_by_what_the_dense_block_reads_behind_pruned_ones(
    label: str, workers: bool, bench: Workbench
) -> None:
    profile, recipe = bench.profile(ignore, masks_only=True), parse_recipe(label)
    if workers:
        join_team(bench)
    assert recipe == Recipe(method=recipe.method, refit=False, allocation="uniform")
    wanda, modules = recipe.method == "wanda", {layer.name: layer.module for layer in bench.weights.layers}
    dense = {name: module.weight.detach().clone() for name, module in modules.items()}
    zeros = {
        name: len(w_OI) * int(w_OI.shape[1] * SHARE) if wanda else round(w_OI.numel() * SHARE)
        for name, w_OI in dense.items()
    }
    bench.pruner.prune(profile, order_all(recipe, zeros, sparsity=SHARE, predicted_kl=0.0), ignore)
    ours = {name: module.weight.detach().clone() for name, module in modules.items()}

    bench.pruner.restore("dense")
    for block in sorted({layer.block for layer in bench.weights.layers}):
        own = {layer.name: layer.module for layer in bench.weights.layers if layer.block == block}
        moments = collect_moments(bench.model, own, bench.windows.calibration)
        for name, module in own.items():
            w_OI = module.weight.detach()
            if wanda:
                pruned_OI = w_OI.masked_fill(choose_rows(w_OI.double().abs() * moments[name].diagonal().sqrt()), 0)
                assert torch.equal(ours[name], pruned_OI), name
            else:
                pruned_OI = prune_as_sparsegpt(w_OI, moments[name]).float()
                assert torch.equal(ours[name] == 0, pruned_OI == 0), name
                torch.testing.assert_close(ours[name], pruned_OI, rtol=2e-3, atol=2e-4)
            module.weight.data.copy_(pruned_OI)
    plain = recipe.model_copy(update={"statistics": "dense"})
    for name, module in modules.items():  # the workbench knows nothing of the loop above
        module.weight.data.copy_(dense[name])
    bench.pruner.prune(profile, order_all(plain, zeros, sparsity=SHARE, predicted_kl=0.0), ignore)
    differ = {
        layer.block for layer in bench.weights.layers if not torch.equal(ours[layer.name] == 0, layer.weight_OI == 0)
    }
    assert differ and 0 not in differ
