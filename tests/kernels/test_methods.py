"""The methods by name: exact counts, the right criterion, and survivors that survive."""

import math

import pytest
import torch
from torch import Tensor

from kernels.masks import keep_highest, keep_highest_of_rows
from kernels.methods import MASK_ONLY, METHODS, LayerStatistics, prune_weight
from kernels.refit import refit_survivors
from kernels.scores import score_two_sided, score_wanda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype = torch.float32, rows: int = 12, columns: int = 17) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    moment = x.T @ x / 300
    weight = torch.randn(rows, columns, generator=generator).mul(0.05).to(dtype)
    weight[0, :3] = 0
    gamma = torch.rand(rows, generator=generator)
    return weight, LayerStatistics(moment.diagonal().clone(), gamma, moment)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_counts_are_exact_and_zeros_are_plain(method: str, refit: bool, dtype: torch.dtype) -> None:
    weight, statistics = make(dtype)
    for zeros in (3, 92, weight.numel()):
        pruned = prune_weight(method, weight, statistics, zeros, refit=refit)
        assert pruned.dtype == dtype
        assert int((pruned == 0).sum()) == zeros
        assert not torch.signbit(pruned[pruned == 0]).any()  # -0.0 would not come back from a packed artifact
        mask = METHODS[method](weight, statistics, zeros).keep_OI
        assert torch.equal(pruned != 0, mask)


def test_wanda_compares_within_rows_and_two_sided_within_the_layer() -> None:
    weight, statistics = make()
    dead = weight == 0
    wanda = keep_highest_of_rows(score_wanda(weight, statistics.mean_square_I), dead, 92)
    assert torch.equal(METHODS["wanda"](weight, statistics, 92).keep_OI, wanda)
    score = score_two_sided(weight, statistics.mean_square_I, statistics.gradient_square_O)
    assert torch.equal(METHODS["two-sided"](weight, statistics, 92).keep_OI, keep_highest(score, dead, 92))


def test_without_refit_survivors_are_the_dense_weights() -> None:
    weight, statistics = make()
    pruned = prune_weight("two-sided", weight, statistics, 92, refit=False)
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_with_refit_survivors_are_fitted() -> None:
    weight, statistics = make()
    assert statistics.second_moment_II is not None
    keep = METHODS["two-sided"](weight, statistics, 92).keep_OI
    fitted = prune_weight("two-sided", weight, statistics, 92, refit=True)
    assert torch.equal(fitted, refit_survivors(weight, keep, statistics.second_moment_II))
    assert not torch.equal(fitted, weight * keep)


def test_a_survivor_fitted_to_almost_zero_is_still_a_survivor() -> None:
    # Two inputs that are each other's negative: the best survivor for weights (1, 1) is almost nothing in fp16.
    weight = torch.tensor([[1.0, 0.99]], dtype=torch.float16)
    moment = torch.tensor([[1.0, -1.02], [-1.02, 1.0]])
    statistics = LayerStatistics(torch.ones(2), torch.ones(1), moment)
    pruned = prune_weight("wanda", weight, statistics, 1, refit=True)
    assert float(pruned[0, 1]) == 0
    assert 0 < abs(float(pruned[0, 0])) < 0.02


def test_a_survivor_that_underflows_is_still_a_survivor(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = make(torch.float16)
    monkeypatch.setattr("kernels.methods.refit_survivors", lambda dense, keep, moment: dense.float() * keep * 1e-9)
    pruned = prune_weight("two-sided", weight, statistics, 92, refit=True)
    assert int((pruned == 0).sum()) == 92


def test_a_refit_without_second_moment_is_refused() -> None:
    weight, statistics = make()
    lacking = LayerStatistics(statistics.mean_square_I, statistics.gradient_square_O)
    with pytest.raises(ValueError, match="changing the survivors needs the second moment of the layer's inputs"):
        prune_weight("wanda", weight, lacking, 5, refit=True)
    prune_weight("wanda", weight, lacking, 5, refit=False)
    with pytest.raises(ValueError, match="needs the second moment"):
        prune_weight("sparsegpt", weight, lacking, 5, refit=False)


def test_statistics_that_are_not_finite_are_refused() -> None:
    weight, statistics = make()
    assert statistics.second_moment_II is not None
    bad = LayerStatistics(statistics.mean_square_I * math.nan, statistics.gradient_square_O)
    with pytest.raises(ValueError, match="not finite"):
        prune_weight("wanda", weight, bad, 5, refit=False)
    moment = statistics.second_moment_II.clone()
    moment[1, 2] = math.inf
    bad = LayerStatistics(statistics.mean_square_I, statistics.gradient_square_O, moment)
    with pytest.raises(ValueError, match="the refit is not finite"):
        prune_weight("two-sided", weight, bad, 92, refit=True)


def test_methods_that_change_no_survivor_are_known() -> None:
    weight, statistics = make()
    for method in METHODS:
        pruned, keep = METHODS[method](weight, statistics, 92)
        assert torch.equal(pruned, torch.where(keep, weight, 0)) is (method in MASK_ONLY)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_dense_weight_is_left_alone(method: str) -> None:
    weight, statistics = make()
    copy = weight.clone()
    prune_weight(method, weight, statistics, 92, refit=True)
    assert torch.equal(weight, copy)
