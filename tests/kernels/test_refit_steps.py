"""The stepped refit against the same steps in float64: masks by sorting, every row solved on its own."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from billhook_kernels.refit_steps import plan_steps, refit_in_levels, refit_in_steps, refit_survivors
from tests.kernels.layers import Layer, make_layer, true_errors
from tests.kernels.plain import Array, Flags, solve_rows

EXACT = {"iterations": 400, "last_iterations": 400, "tolerance": 1e-7}


def plain_steps(layer: Layer, counts: list[int], pattern: tuple[int, int] | None = None) -> tuple[Array, Flags]:
    """The mask grown to each of `counts` zeros in turn, one weight at a time, and every row solved in between."""
    fitted = layer.weight.double().numpy()
    keep = np.ones(fitted.shape, dtype=bool)
    exact = fitted == 0
    a, gamma = np.diag(layer.moment.double().numpy()), layer.gamma.double().numpy()
    for count in counts:
        score = fitted**2 * a * gamma[:, None]
        order = sorted(np.ndindex(*keep.shape), key=lambda p: (keep[p] and not exact[p], score[p], p))
        candidates = [p for p in order if keep[p]]
        for i, j in candidates:
            if (~keep).sum() == count:
                break
            if pattern is not None:
                pruned, group = pattern
                start = j // group * group
                if (~keep[i, start : start + group]).sum() == pruned:
                    continue
            keep[i, j] = False
        fitted = solve_rows(layer.weight, keep, layer.moment)
    return fitted, keep


@pytest.mark.parametrize(("rows", "columns"), [(6, 5), (1, 40), (9, 33), (5, 130)])
@pytest.mark.parametrize("sparsity", [0.45, 0.8])
def test_it_is_the_same_steps_solved_exactly(rows: int, columns: int, sparsity: float) -> None:
    layer = make_layer(rows, columns)
    zeros = round(sparsity * layer.weight.numel())
    result = refit_in_steps(layer.weight, layer.moment, layer.gamma, zeros, **EXACT)
    expected, keep = plain_steps(layer, plan_steps(zeros, 5, 0))
    assert int((~result.keep_OI).sum()) == zeros
    assert np.array_equal(result.keep_OI.numpy(), keep)
    np.testing.assert_allclose(result.weight_OI.numpy(), expected, atol=3e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("pruned", "group", "columns"), [(2, 4, 32), (4, 8, 40), (1, 3, 33)])
def test_groups_grow_alike(pruned: int, group: int, columns: int) -> None:
    layer = make_layer(6, columns)
    zeros = layer.weight.numel() // group * pruned
    result = refit_in_steps(layer.weight, layer.moment, layer.gamma, zeros, pattern=(pruned, group), **EXACT)
    assert ((~result.keep_OI).reshape(-1, group).sum(1) == pruned).all()
    expected, keep = plain_steps(layer, plan_steps(zeros, 5, 0), (pruned, group))
    assert np.array_equal(result.keep_OI.numpy(), keep)
    np.testing.assert_allclose(result.weight_OI.numpy(), expected, atol=3e-3 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_layers_that_are_sparse_already_grow_alike(
    pattern: tuple[int, int] | None, rows: int, dtype: torch.dtype
) -> None:
    layer = make_layer(rows, 40)
    layer.weight[torch.rand(rows, 40, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    layer.weight[:, 8:12] = 0  # a whole group, and a column that saw no input
    layer.moment[[3, 17]], layer.moment[:, [3, 17]] = 0, 0
    layer = layer._replace(weight=layer.weight.to(dtype))
    zeros = layer.weight.numel() // 2
    result = refit_in_steps(layer.weight, layer.moment, layer.gamma, zeros, pattern=pattern, **EXACT)
    present = layer.weight == 0
    if pattern is not None:  # no more than two of a group count, those on the left
        present &= present.reshape(-1, 4).cumsum(1).reshape(rows, 40) <= 2
    expected, keep = plain_steps(layer, plan_steps(zeros, 5, int(present.sum())), pattern)
    assert np.array_equal(result.keep_OI.numpy(), keep)
    fitted = result.weight_OI.double().numpy()
    tolerance = 3e-3 if dtype == torch.float32 else 8e-3
    np.testing.assert_allclose(fitted, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_with_the_defaults_it_ends_near_the_optimum_of_its_mask(pattern: tuple[int, int] | None) -> None:
    layer = make_layer(64, 128)
    zeros = layer.weight.numel() // 2
    result = refit_in_steps(layer.weight, layer.moment, layer.gamma, zeros, pattern=pattern)
    keep = result.keep_OI.numpy()
    best = true_errors(solve_rows(layer.weight, keep, layer.moment), layer).sum()
    masked = true_errors(np.where(keep, layer.weight.double().numpy(), 0), layer).sum()
    assert true_errors(result.weight_OI.double().numpy(), layer).sum() - best < 0.02 * (masked - best)


def test_more_steps_choose_better() -> None:
    layer = make_layer(48, 96)
    errors = []
    for steps in (1, 3, 8):
        result = refit_in_steps(layer.weight, layer.moment, layer.gamma, 2600, steps=steps, **EXACT)
        errors.append(layer.gamma.double().numpy() @ true_errors(result.weight_OI.double().numpy(), layer))
    assert errors[0] > errors[1] > errors[2]


def test_one_step_is_a_mask_and_a_refit() -> None:
    layer = make_layer(8, 20)
    result = refit_in_steps(layer.weight, layer.moment, layer.gamma, 70, steps=1, last_iterations=16)
    _, keep = plain_steps(layer, [70])
    assert np.array_equal(result.keep_OI.numpy(), keep)
    assert torch.equal(result.weight_OI, refit_survivors(layer.weight, result.keep_OI, layer.moment, iterations=16))


def test_levels_are_the_steps_of_one_mask() -> None:
    layer = make_layer(6, 30)
    layer.weight[2, :20] = 0
    counts = [20, 50, 51, 51, 110, 180]
    levels = refit_in_levels(layer.weight, layer.moment, layer.gamma, counts, iterations=400, tolerance=1e-7)
    for i, level in enumerate(levels):
        expected, keep = plain_steps(layer, counts[: i + 1])
        assert int((~level.keep_OI).sum()) == int((level.weight_OI == 0).sum()) == counts[i]
        assert np.array_equal(level.keep_OI.numpy(), keep)
        np.testing.assert_allclose(level.weight_OI.numpy(), expected, atol=3e-3 * np.abs(expected).max())


def test_levels_must_ascend() -> None:
    layer = make_layer(2, 8)
    with pytest.raises(ValueError, match=r"^5 zeros asked of a layer of 16 weights that has 6 already$"):
        list(refit_in_levels(layer.weight, layer.moment, layer.gamma, [6, 5]))


@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0, 1))
def test_steps_grow_and_land_exactly(zeros: int, steps: int, share: float) -> None:
    present = round(share * zeros)
    counts = plan_steps(zeros, steps, present)
    assert counts[-1] == zeros and len(counts) <= steps
    assert all(before < after for before, after in pairwise(counts))
    assert counts == [zeros] or counts[0] > present


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a mask cannot grow in 0 steps$"):
        plan_steps(5, 0, 0)


def test_exact_zeros_go_first_and_stay_zero() -> None:
    layer = make_layer(6, 30)
    layer.weight[torch.rand(6, 30, generator=torch.Generator().manual_seed(3)) < 0.3] = 0
    layer.weight[2] = 0
    exact = layer.weight == 0
    for extra in (0, 40):
        zeros = int(exact.sum()) + extra
        result = refit_in_steps(layer.weight, layer.moment, layer.gamma, zeros)
        assert int((~result.keep_OI).sum()) == zeros
        assert not result.keep_OI[exact].any() and not result.weight_OI[exact].any()
        if not extra:
            assert torch.equal(result.weight_OI, layer.weight)


def test_a_group_with_more_exact_zeros_than_it_may_lose_keeps_the_others() -> None:
    layer = make_layer(3, 16)
    layer.weight[1, 4:7] = 0
    result = refit_in_steps(layer.weight, layer.moment, layer.gamma, 24, pattern=(2, 4), **EXACT)
    assert result.keep_OI[1, 4:8].tolist() == [False, False, True, True]
    assert float(result.weight_OI[1, 6]) != 0  # the refit found a use for it
    expected = solve_rows(layer.weight, result.keep_OI.numpy(), layer.moment)
    np.testing.assert_allclose(result.weight_OI.numpy(), expected, atol=3e-3 * np.abs(expected).max())


def test_dead_columns_go_first_and_keep_their_weights_where_they_stay() -> None:
    layer = make_layer(5, 20)
    layer.moment[[3, 7]], layer.moment[:, [3, 7]] = 0, 0
    result = refit_in_steps(layer.weight, layer.moment, layer.gamma, 40)
    assert not result.keep_OI[:, [3, 7]].any()
    few = refit_in_steps(layer.weight, layer.moment, layer.gamma, 4)
    assert torch.equal(few.weight_OI, layer.weight * few.keep_OI)


def test_inputs_that_are_all_zero_leave_the_mask() -> None:
    layer = make_layer(3, 5)
    result = refit_in_steps(layer.weight, layer.moment * 0, layer.gamma, 7)
    assert torch.equal(result.weight_OI, layer.weight * result.keep_OI)
    assert int((~result.keep_OI).sum()) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_fitted_in_fp32(dtype: torch.dtype) -> None:
    layer = make_layer(8, 40)
    half = layer.weight.to(dtype)
    result = refit_in_steps(half, layer.moment, layer.gamma, 150)
    exact = refit_in_steps(half.float(), layer.moment, layer.gamma, 150)
    assert result.weight_OI.dtype == dtype
    assert torch.equal(result.weight_OI, exact.weight_OI.to(dtype))


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.booleans(), st.integers(0, 4))
def test_no_row_is_worse_than_its_mask_alone(
    seed: int, rows: int, columns: int, sparsity: float, half: bool, iterations: int
) -> None:
    layer = make_layer(rows, columns, seed, tokens=1 + seed % 60)
    if half:
        layer = layer._replace(weight=layer.weight.bfloat16())
    result = refit_in_steps(
        layer.weight,
        layer.moment,
        layer.gamma,
        round(sparsity * layer.weight.numel()),
        iterations=iterations,
        last_iterations=iterations,
    )
    masked = true_errors((layer.weight * result.keep_OI).double().numpy(), layer)
    updated = true_errors(result.weight_OI.double().numpy(), layer)
    assert (updated <= masked * (1 + 1e-3) + 1e-7 * float(layer.moment.diagonal().sum())).all()


def test_impossible_requests_are_refused_in_one_line() -> None:
    layer = make_layer(2, 8)
    layer.weight[0, :4] = 0
    with pytest.raises(ValueError, match=r"^3 zeros asked of a layer of 16 weights that has 4 already$"):
        refit_in_steps(layer.weight, layer.moment, layer.gamma, 3)
    with pytest.raises(ValueError, match=r"^17 zeros asked of a layer of 16 weights that has 4 already$"):
        refit_in_steps(layer.weight, layer.moment, layer.gamma, 17)
    with pytest.raises(ValueError, match=r"^7 zeros asked of a layer to which the pattern 2:4 gives 8$"):
        refit_in_steps(layer.weight, layer.moment, layer.gamma, 7, pattern=(2, 4))
    with pytest.raises(ValueError, match=r"^8 inputs are not divisible into groups of 3$"):
        refit_in_steps(layer.weight, layer.moment, layer.gamma, 8, pattern=(1, 3))


def test_statistics_that_are_not_finite_are_refused() -> None:
    layer = make_layer(4, 8)
    with pytest.raises(ValueError, match="not finite"):
        refit_in_steps(layer.weight, layer.moment, layer.gamma * torch.nan, 8)
    layer.moment[1, 2] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        refit_in_steps(layer.weight, layer.moment, layer.gamma, 8)


def test_arguments_are_left_alone() -> None:
    layer = make_layer(4, 8)
    copies: list[Tensor] = [t.clone() for t in layer]
    refit_in_steps(layer.weight, layer.moment, layer.gamma, 16, pattern=(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(layer, copies, strict=True))
