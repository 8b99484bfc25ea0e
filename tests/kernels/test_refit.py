"""Refit against damped least squares of every row alone, in float64."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from billhook_kernels.refit_steps import refit_survivors
from tests.kernels.plain import Array, damped, solve_rows

SCALES = st.sampled_from([1e-12, 1.0, 1e9])


def errors(weight: Tensor | Array, dense: Tensor, second_moment: Tensor) -> Array:
    """(w - w0)^T H (w - w0) of every row."""
    change = np.asarray(weight, dtype=np.float64) - dense.double().numpy()
    return np.asarray(np.einsum("oi,ij,oj->o", change, damped(second_moment), change))


def make_layer(rows: int, columns: int, seed: int = 0, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """(dense, keep, A): correlated inputs with a few loud features, 45 % of the weights removed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, ::9] *= 10
    dense = torch.randn(rows, columns, generator=generator)
    return dense, torch.rand(rows, columns, generator=generator) > 0.45, x.T @ x / tokens


def test_converged_it_is_the_least_squares_solution() -> None:
    dense, keep, moment = make_layer(12, 33)
    fitted = refit_survivors(dense, keep, moment, iterations=400, tolerance=1e-7)
    assert fitted.dtype == torch.float32
    exact = solve_rows(dense, keep.numpy(), moment)
    np.testing.assert_allclose(fitted.numpy(), exact, atol=2e-3 * np.abs(exact).max())
    assert errors(fitted, dense, moment).sum() <= errors(exact, dense, moment).sum() * 1.0001
    assert not fitted[~keep].any()


@pytest.mark.parametrize("kind", ["2:4", "columns", "rows", "one row"])
def test_any_mask_is_fitted(kind: str) -> None:
    dense, keep, moment = make_layer(1 if kind == "one row" else 9, 32)
    if kind == "2:4":
        order = torch.rand(9 * 8, 4, generator=torch.Generator().manual_seed(1)).argsort(1)
        keep = (order < 2).reshape(9, 32)
    elif kind == "columns":
        keep[:] = keep[0]
    elif kind == "rows":
        keep[:] = keep[:, :1]
    fitted = refit_survivors(dense, keep, moment, iterations=400, tolerance=1e-7)
    exact = solve_rows(dense, keep.numpy(), moment)
    np.testing.assert_allclose(fitted.numpy(), exact, atol=2e-3 * np.abs(exact).max())


def test_the_default_comes_near_it() -> None:
    dense, keep, moment = make_layer(12, 33)
    masked = errors(dense * keep, dense, moment).sum()
    best = errors(solve_rows(dense, keep.numpy(), moment), dense, moment).sum()
    fitted = errors(refit_survivors(dense, keep, moment), dense, moment).sum()
    assert fitted - best < 0.02 * (masked - best)


def test_as_many_iterations_as_weights_are_enough() -> None:
    dense, keep, moment = make_layer(20, 6)  # which conjugate directions need, and steepest descent does not manage
    masked = errors(dense * keep, dense, moment)
    best = errors(solve_rows(dense, keep.numpy(), moment), dense, moment)
    fitted = errors(refit_survivors(dense, keep, moment, iterations=6, tolerance=0.0), dense, moment)
    assert (fitted - best <= 1e-4 * masked).all()


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 9), st.integers(0, 40), SCALES)
def test_no_iteration_is_worse_than_the_mask_alone(
    seed: int, rows: int, columns: int, iterations: int, scale: float
) -> None:
    dense, keep, moment = make_layer(rows, columns, seed, tokens=1 + seed % 12)
    moment *= scale
    fitted = refit_survivors(dense, keep, moment, iterations=iterations, tolerance=0.0)
    assert torch.isfinite(fitted).all() and not fitted[~keep].any()
    masked = errors(dense * keep, dense, moment)
    assert (errors(fitted, dense, moment) <= masked * (1 + 1e-4) + 1e-9 * scale).all()


def test_no_iterations_leave_the_masked_dense_weights() -> None:
    dense, keep, moment = make_layer(4, 8)
    assert torch.equal(refit_survivors(dense, keep, moment, iterations=0), dense * keep)


def test_dead_columns_neither_move_nor_disturb() -> None:
    dense, keep, moment = make_layer(6, 12)
    moment[3], moment[:, 3] = 0, 0
    fitted = refit_survivors(dense, keep, moment, iterations=200, tolerance=1e-7)
    assert torch.equal(fitted[:, 3], (dense * keep)[:, 3])
    np.testing.assert_allclose(fitted.numpy(), solve_rows(dense, keep.numpy(), moment), atol=2e-3)


def test_inputs_that_are_all_zero_leave_the_mask() -> None:
    dense, keep, moment = make_layer(3, 5)
    assert torch.equal(refit_survivors(dense, keep, moment * 0), dense * keep)


def test_a_row_that_is_already_exact_stays() -> None:
    dense, keep, moment = make_layer(5, 16)
    keep[1] = True  # nothing was removed
    dense[2, ~keep[2]] = 0  # what was removed was zero
    keep[3] = False  # nothing is left
    fitted = refit_survivors(dense, keep, moment, iterations=100, tolerance=0.0)
    assert torch.equal(fitted[1:4], (dense * keep)[1:4])
    assert not torch.equal(fitted[4], (dense * keep)[4])


def test_arguments_are_left_alone() -> None:
    dense, keep, moment = make_layer(4, 8)
    copies = dense.clone(), keep.clone(), moment.clone()
    refit_survivors(dense, keep, moment)
    assert all(torch.equal(a, b) for a, b in zip((dense, keep, moment), copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_fitted_in_fp32(dtype: torch.dtype) -> None:
    dense, keep, moment = make_layer(4, 8)
    fitted = refit_survivors(dense.to(dtype), keep, moment)
    assert fitted.dtype == torch.float32
    assert torch.equal(fitted, refit_survivors(dense.to(dtype).float(), keep, moment))


def test_a_transposed_view_gives_the_same() -> None:
    dense, keep, moment = make_layer(7, 9)
    torch.testing.assert_close(
        refit_survivors(dense.T.contiguous().T, keep.T.contiguous().T, moment), refit_survivors(dense, keep, moment)
    )
