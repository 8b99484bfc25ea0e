"""The methods by name: exact counts, the right criterion, and survivors that survive."""

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import billhook_kernels.methods
from billhook_kernels.guard import DAMPING
from billhook_kernels.masks import keep_highest, keep_highest_of_rows, score_two_sided, score_wanda
from billhook_kernels.methods import METHODS, LayerStatistics, prune_levels, prune_weight
from billhook_kernels.obs import prune_obs_groups
from billhook_kernels.refit_steps import refit_in_levels, refit_in_steps, refit_survivors
from tests.kernels.layers import DTYPES, MASK_ONLY, make_layer
from tests.kernels.plain import plain_groups, solve_rows

UPDATES = [(method, refit) for method in sorted(METHODS) for refit in (False, True) if refit or method not in MASK_ONLY]


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
        pruned, keep, damping = prune_weight(method, weight, statistics, zeros, refit=refit)
        assert pruned.dtype == dtype and damping == DAMPING
        assert int((pruned == 0).sum()) == zeros
        assert not torch.signbit(pruned[pruned == 0]).any()  # -0.0 would not come back from a packed artifact
        assert torch.equal(pruned != 0, keep)
        assert torch.equal(keep, METHODS[method](weight, statistics, zeros).keep_OI)


def test_wanda_compares_within_rows_and_two_sided_within_the_layer() -> None:
    weight, statistics = make()
    dead = weight == 0
    wanda = keep_highest_of_rows(score_wanda(weight, statistics.mean_square_I), dead, 92)
    assert torch.equal(METHODS["wanda"](weight, statistics, 92).keep_OI, wanda)
    score = score_two_sided(weight, statistics.mean_square_I, statistics.gradient_square_O)
    assert torch.equal(METHODS["two-sided"](weight, statistics, 92).keep_OI, keep_highest(score, dead, 92))
    assert torch.equal(METHODS["magnitude"](weight, statistics, 92).keep_OI, keep_highest(weight.abs(), dead, 92))


PLAIN = {"magnitude": False, "wanda": True, "two-sided": True}
"""The methods that only mask and whose score in a group is |w|, or with True |w| times the input's norm; one of another
score has a reference of its own, in a test beside this one."""


def plain_masks(method: str, weight: Tensor, mean_square: Tensor, pruned: int, group: int) -> list[list[bool]]:
    """The mask in float64, one row at a time."""
    size, root = weight.double().abs(), mean_square.double().sqrt()
    score = size * root if PLAIN[method] else size
    return [
        plain_groups(row, dead, pruned, group) for row, dead in zip(score.tolist(), (size == 0).tolist(), strict=True)
    ]


@pytest.mark.parametrize("kind", ["dense", "dead columns", "ties", "sparse already"])
@pytest.mark.parametrize(
    ("dtype", "pruned", "group", "rows"),
    [(torch.float32, 2, 4, 7), (torch.bfloat16, 4, 8, 7), (torch.float32, 5, 12, 1)],
)
@pytest.mark.parametrize("method", PLAIN)
def test_masks_of_groups(method: str, dtype: torch.dtype, pruned: int, group: int, rows: int, kind: str) -> None:
    weight, statistics = make(dtype, rows, 48)
    if kind == "dead columns":
        statistics.mean_square_I[::3] = 0
    elif kind == "ties":
        weight = weight.mul(20).round()
        statistics.mean_square_I[:] = 2.0
    elif kind == "sparse already":
        weight[:, 8:22] = -0.0
        weight[:, ::3] = 0
    expected = torch.tensor(plain_masks(method, weight, statistics.mean_square_I, pruned, group))
    result = prune_weight(method, weight, statistics, rows * 48 // group * pruned, refit=False, pattern=(pruned, group))
    assert torch.equal(result.keep_OI, expected)
    assert ((~expected).reshape(-1, group).sum(1) == pruned).all()
    # An exact zero that its group had no room for stays one, and a survivor stays what it was.
    assert torch.equal(result.weight_OI, weight * expected)
    assert not torch.signbit(result.weight_OI[result.weight_OI == 0]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sparse", "pattern"), [(False, (2, 4)), (True, (4, 8))])
@pytest.mark.parametrize(("method", "refit"), UPDATES)
def test_updates_of_groups(
    method: str, refit: bool, pattern: tuple[int, int], sparse: bool, dtype: torch.dtype
) -> None:
    weight, statistics = make(dtype, 6, 24)
    if sparse:
        weight[1], weight[:, 4:7], weight[2, ::2] = 0, 0, 0
    else:
        weight[weight == 0] = 0.03
    zeros = weight.numel() // pattern[1] * pattern[0]
    result = prune_weight(method, weight, statistics, zeros, refit=refit, pattern=pattern)
    assert result.weight_OI.dtype == dtype
    assert ((~result.keep_OI).reshape(-1, pattern[1]).sum(1) == pattern[0]).all()
    assert not result.weight_OI[~result.keep_OI].any()
    unfilled = (result.weight_OI == 0) & result.keep_OI
    assert not weight[unfilled].any() and (sparse or not unfilled.any())
    assert not torch.signbit(result.weight_OI[result.weight_OI == 0]).any()
    # A row of nothing but zeros stays one: no survivor of it is made up.
    assert not sparse or not result.weight_OI[1].any()


def test_an_update_fills_the_zeros_that_a_group_has_no_room_for() -> None:
    weight, statistics = make(columns=24)
    weight[3, 4:7] = 0
    for method, refit in UPDATES:
        result = prune_weight(method, weight, statistics, 144, refit=refit, pattern=(2, 4))
        assert (result.weight_OI[3, 4:8] != 0).tolist() == [False, False, True, True]


def test_methods_with_an_update_of_groups_are_those_of_the_kernels() -> None:
    weight, statistics = make(columns=24)
    moment, gamma = statistics.moment_II, statistics.gradient_square_O
    for method in ("sparsegpt", "two-sided-obs"):
        result = prune_weight(method, weight, statistics, 144, refit=False, pattern=(4, 8))
        assert torch.equal(result.weight_OI, prune_obs_groups(weight, moment, 4, 8).weight_OI)
    result = prune_weight("refit", weight, statistics, 144, refit=False, pattern=(4, 8))
    assert torch.equal(result.weight_OI, refit_in_steps(weight, moment, gamma, 144, pattern=(4, 8)).weight_OI)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_is_no_pattern_of_the_layer_is_refused_in_one_line(method: str, refit: bool) -> None:
    weight, statistics = make()
    with pytest.raises(ValueError, match=r"^17 inputs are not divisible into groups of 4$"):
        prune_weight(method, weight, statistics, 102, refit=refit, pattern=(2, 4))
    weight, statistics = make(columns=16)
    with pytest.raises(ValueError, match=r"^95 zeros asked of a layer to which the pattern 2:4 gives 96$"):
        prune_weight(method, weight, statistics, 95, refit=refit, pattern=(2, 4))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_counts_that_cannot_be_are_refused_in_one_line(method: str) -> None:
    weight, statistics = make()
    with pytest.raises(ValueError, match=r"^2 zeros asked of a layer (of 204 weights )?that has 3 already$"):
        prune_weight(method, weight, statistics, 2, refit=False)
    with pytest.raises(ValueError, match=r"^205 zeros asked of a layer of 204 weights"):
        prune_weight(method, weight, statistics, 205, refit=False)


def test_without_refit_survivors_are_the_dense_weights() -> None:
    weight, statistics = make()
    pruned = prune_weight("two-sided", weight, statistics, 92, refit=False).weight_OI
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_with_refit_survivors_are_fitted() -> None:
    weight, statistics = make()
    keep = METHODS["two-sided"](weight, statistics, 92).keep_OI
    fitted = prune_weight("two-sided", weight, statistics, 92, refit=True).weight_OI
    assert torch.equal(fitted, refit_survivors(weight, keep, statistics.moment_II))
    assert not torch.equal(fitted, weight * keep)


def test_steps_of_the_method_refit() -> None:
    weight, statistics = make()
    known = statistics.moment_II, statistics.gradient_square_O
    made = {}
    for steps in (1, 3, 5, 10):
        made[steps] = prune_weight("refit", weight, statistics, 92, refit=False, refit_steps=steps).weight_OI
        assert torch.equal(made[steps], refit_in_steps(weight, *known, 92, steps=steps).weight_OI)
    assert torch.equal(made[5], prune_weight("refit", weight, statistics, 92, refit=False).weight_OI)
    assert not torch.equal(made[1], made[10])
    wanda = [prune_weight("wanda", weight, statistics, 92, refit=True, refit_steps=k).weight_OI for k in (1, 5)]
    assert torch.equal(*wanda)


@pytest.mark.parametrize(("method", "refit"), [("refit", False), ("two-sided", True), ("sparsegpt", True)])
def test_damped_fits_are_ridge_regressions_in_even_coordinates(method: str, refit: bool) -> None:
    weight, statistics = make()
    fitted, keep, _ = prune_weight(method, weight, statistics, 92, refit=refit, damping=0.5)
    moment = statistics.moment_II
    ridge = (moment + 0.5 * moment.diagonal().diag()) / 1.5
    exact = solve_rows(weight, keep.numpy(), ridge)
    np.testing.assert_allclose(fitted.numpy(), exact, atol=0.02 * np.abs(exact).max())
    plain = prune_weight(method, weight, statistics, 92, refit=refit)
    assert torch.equal(plain.keep_OI, keep) is (method != "refit"), "its mask grows on what was fitted"
    assert not torch.equal(plain.weight_OI, fitted)
    much = prune_weight(method, weight, statistics, 92, refit=refit, damping=10).weight_OI
    assert ((much - weight) * keep).square().sum() < ((fitted - weight) * keep).square().sum()


def test_nothing_is_damped_where_nothing_is_fitted() -> None:
    weight, statistics = make()
    for method in METHODS.keys() - {"refit"}:
        pruned = prune_weight(method, weight, statistics, 92, refit=False, damping=1)
        assert torch.equal(pruned.weight_OI, prune_weight(method, weight, statistics, 92, refit=False).weight_OI)


def test_levels_are_damped_as_layers_are() -> None:
    weight, statistics = make()
    [level] = prune_levels("two-sided", weight, statistics, [92], refit=True, damping=0.5)
    assert torch.equal(level, prune_weight("two-sided", weight, statistics, 92, refit=True, damping=0.5).weight_OI)
    damped, plain = ([*prune_levels("refit", weight, statistics, [31, 92], refit=False, damping=d)] for d in (0.5, 0))
    assert not torch.equal(damped[1], plain[1])


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    method, refit = draw(st.sampled_from(UPDATES))
    pattern = draw(st.sampled_from([None, (2, 4), (3, 4)]))
    return {"method": method, "refit": refit, "pattern": pattern}


@given(
    requests(), st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 6), st.floats(0, 1), st.sampled_from(DTYPES)
)
def test_no_row_is_worse_than_its_mask_alone(
    request: dict[str, Any], seed: int, rows: int, groups: int, sparsity: float, dtype: torch.dtype
) -> None:
    columns = 4 * groups
    layer = make_layer(rows, columns, seed, tokens=1 + seed % 60)
    weight, pattern = layer.weight.mul(0.05).to(dtype), request["pattern"]
    zeros = round(sparsity * weight.numel()) if pattern is None else weight.numel() // 4 * pattern[0]
    statistics = LayerStatistics(layer.moment.diagonal(), layer.gamma, layer.moment)
    result = prune_weight(weight_OI=weight, statistics=statistics, zeros=zeros, **request)

    def errors(pruned: Tensor) -> Tensor:
        change = (weight - pruned).double()
        return ((change @ layer.moment.double()) * change).sum(1)

    assert int((result.weight_OI == 0).sum()) == zeros
    scale = 2.5e-3 * float(layer.moment.diagonal().sum())
    assert (errors(result.weight_OI) <= errors(weight * result.keep_OI) * (1 + 1e-3) + 1e-7 * scale).all()


def test_more_damping_is_reported() -> None:
    moment = torch.eye(6)
    moment[0, 1] = moment[1, 0] = 1.05  # not positive definite: no moment is, but sums in low precision can be
    weight, statistics = torch.ones(3, 6), LayerStatistics(torch.ones(6), torch.ones(3), moment)
    for pattern in (None, (1, 2)):
        assert prune_weight("sparsegpt", weight, statistics, 9, refit=False, pattern=pattern).damping == 10 * DAMPING
        assert prune_weight("wanda", weight, statistics, 9, refit=False, pattern=pattern).damping == DAMPING


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "refit"), UPDATES + [(method, False) for method in MASK_ONLY])
def test_levels_are_the_layer_as_it_would_be_pruned(method: str, refit: bool, dtype: torch.dtype) -> None:
    weight, statistics = make(dtype)
    zeros = [0, 2, 3, 31, 92, 92, 150, weight.numel()]
    levels = [*prune_levels(method, weight, statistics, zeros, refit=refit)]
    assert [level.dtype for level in levels] == [dtype] * len(zeros)
    assert [int((level == 0).sum()) for level in levels] == [3, 3, *zeros[2:]]
    assert all(torch.equal(level, weight) for level in levels[:3])
    if method != "refit":
        for level, count in zip(levels[2:], zeros[2:], strict=True):
            assert torch.equal(level, prune_weight(method, weight, statistics, count, refit=refit).weight_OI)


def test_levels_of_the_stepped_method_are_one_mask_that_grows() -> None:
    weight, statistics = make()
    zeros = [31, 92, 150]
    levels = [*prune_levels("refit", weight, statistics, zeros, refit=False)]
    expected = refit_in_levels(weight, statistics.moment_II, statistics.gradient_square_O, zeros)
    for level, pruned in zip(levels, expected, strict=True):
        assert torch.equal(level, pruned.weight_OI)
    masks = [level != 0 for level in levels]
    assert not (masks[1] & ~masks[0]).any() and not (masks[2] & ~masks[1]).any()
    changes = [((level - weight) @ statistics.moment_II * (level - weight)).sum() for level in levels]
    assert changes[0] < changes[1] < changes[2]


def test_levels_prepare_the_second_moment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = make()
    calls = []
    for name in ("prepare_system", "inverse_factor", "prepare_spectrum"):
        function = getattr(billhook_kernels.methods, name)
        monkeypatch.setattr(billhook_kernels.methods, name, lambda a, n=name, f=function: calls.append(n) or f(a))
    list(prune_levels("sparsegpt", weight, statistics, [31, 92, 150], refit=True))
    assert sorted(calls) == ["inverse_factor", "prepare_system"]
    list(prune_levels("refit", weight, statistics, [31, 92, 150], refit=False))
    list(prune_levels("wanda", weight, replace(statistics, second_moment_II=None), [31, 92, 150], refit=False))
    assert len(calls) == 2
    list(prune_levels("alps", weight, statistics, [31, 92, 150], refit=False))
    assert calls[2:] == ["prepare_spectrum"]


def test_no_levels_are_no_weights() -> None:
    weight, statistics = make()
    assert not any([*prune_levels(method, weight, statistics, [], refit=False)] for method in METHODS)


def test_a_survivor_fitted_to_almost_zero_is_still_a_survivor() -> None:
    # Two inputs that are each other's negative: the best survivor for weights (1, 1) is almost nothing in fp16.
    weight = torch.tensor([[1.0, 0.99]], dtype=torch.float16)
    moment = torch.tensor([[1.0, -1.02], [-1.02, 1.0]])
    statistics = LayerStatistics(torch.ones(2), torch.ones(1), moment)
    pruned = prune_weight("wanda", weight, statistics, 1, refit=True).weight_OI
    assert float(pruned[0, 1]) == 0
    assert 0 < abs(float(pruned[0, 0])) < 0.02


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
    bad = LayerStatistics(statistics.mean_square_I * math.nan, statistics.gradient_square_O)
    with pytest.raises(ValueError, match="not finite"):
        prune_weight("wanda", weight, bad, 5, refit=False)
    moment = statistics.moment_II.clone()
    moment[1, 2] = math.inf
    bad = LayerStatistics(statistics.mean_square_I, statistics.gradient_square_O, moment)
    with pytest.raises(ValueError, match="the refit is not finite"):
        prune_weight("two-sided", weight, bad, 92, refit=True)


def test_methods_that_change_no_survivor_are_known() -> None:
    weight, statistics = make()
    for method in METHODS:
        pruned, keep, _ = METHODS[method](weight, statistics, 92)
        assert torch.equal(pruned, torch.where(keep, weight, 0)) is (method in MASK_ONLY)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_arguments_are_left_alone(method: str, pattern: tuple[int, int] | None) -> None:
    weight, statistics = make(rows=6, columns=16)
    tensors = [weight, statistics.mean_square_I, statistics.moment_II, statistics.gradient_square_O]
    copies = [t.clone() for t in tensors]
    prune_weight(method, weight, statistics, 48, refit=True, pattern=pattern)
    list(prune_levels(method, weight, statistics, [20, 48], refit=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_layers_that_read_the_same_inputs_share_what_is_prepared() -> None:
    x_TI = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    first = LayerStatistics(x_TI.square().mean(0), torch.ones(3), x_TI.T @ x_TI / 40)
    assert "system" not in vars(first.for_outputs(torch.ones(5)))
    system, factor, spectrum = first.system, first.factor, first.spectrum
    second = first.for_outputs(2 * torch.ones(5))
    assert second.system is system and second.factor is factor and second.spectrum is spectrum
    damped = first.damp(0.5)
    assert damped is not None and second.damp(0.5) is damped and damped is not system
    assert first.damp(0) is system and second.damp(0) is system
    assert second.gradient_square_O.tolist() == [2.0] * 5 and first.gradient_square_O.tolist() == [1.0] * 3
