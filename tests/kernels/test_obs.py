"""SparseGPT against the column loop of the paper (arXiv 2301.00774, algorithm 1), in float64, one column at a time."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor

from billhook_kernels.guard import DAMPING, finish_update
from billhook_kernels.obs import (
    InverseFactor,
    inverse_factor,
    invert_lower,
    prune_obs,
    prune_obs_groups,
    split_zeros,
)
from tests.kernels.layers import Layer, make_layer, true_errors

Array = NDArray[np.float64]


def plain_factor(moment: Tensor) -> Array:
    """U with (A + damping)^-1 = U^T U, dead columns with H_jj = 1."""
    h = moment.double().numpy().copy()
    damping = DAMPING * np.diag(h).mean()
    for j in range(len(h)):
        h[j, j] = h[j, j] + damping if h[j, j] else 1.0
    return np.asarray(np.linalg.cholesky(np.linalg.inv(h)).T)


def plain_loop(layer: Layer, quotas: list[int], gamma: Tensor | None, group: int = 0, block: int = 128) -> Array:
    """The published loop: at each block (or group) choose what goes, then column by column correct all to the right.

    `quotas` are the zeros of each block, or of each group of each row.
    """
    weight, u = layer.weight.double().numpy().copy(), plain_factor(layer.moment)
    exact, dead = weight == 0, layer.moment.diagonal().numpy() == 0
    row_factor = np.ones(len(weight)) if gamma is None else gamma.double().numpy()
    goes = np.zeros(weight.shape, dtype=bool)

    def choose(rows: list[int], columns: range, count: int) -> None:
        def order(place: tuple[int, int]) -> tuple[bool, float, int, int]:
            i, j = place
            score = 0.0 if dead[j] else weight[i, j] ** 2 / u[j, j] ** 2 * row_factor[i]
            return (not exact[i, j], 0.0 if exact[i, j] else score, j, i)

        for i, j in sorted(((i, j) for i in rows for j in columns), key=order)[:count]:
            goes[i, j] = True

    rows, width = range(len(weight)), weight.shape[1]
    for j in range(width):
        if group and j % group == 0:
            for i in rows:
                choose([i], range(j, j + group), quotas[0])
        elif not group and j % block == 0:
            choose(list(rows), range(j, min(j + block, width)), quotas[j // block])
        error = np.where(goes[:, j], weight[:, j], 0.0) / u[j, j]
        weight[:, j:] -= np.outer(error, u[j, j:])
    return np.where(goes, 0.0, weight)


def plain_quotas(layer: Layer, zeros: int, block: int = 128) -> list[int]:
    """The same share of every block, when none has more for nothing than its share."""
    rows, width = layer.weight.shape
    ends = [zeros * min(end, width) // width for end in range(block, width + block, block)]
    assert ends[-1] == zeros and rows
    return [after - before for before, after in zip([0, *ends[:-1]], ends, strict=True)]


def assert_equal(pruned: Tensor, expected: Array, tolerance: float = 2e-4) -> None:
    assert np.array_equal(pruned.double().numpy() == 0, expected == 0)
    np.testing.assert_allclose(pruned.double().numpy(), expected, atol=tolerance * np.abs(expected).max())


def test_the_factor_is_the_one_of_the_paper() -> None:
    for columns in (1, 2, 65, 200):
        moment = make_layer(2, columns).moment
        factor = inverse_factor(moment)
        assert factor.share == DAMPING and factor.factor_II.dtype == torch.float32
        expected = plain_factor(moment)
        np.testing.assert_allclose(factor.factor_II.numpy(), expected, atol=1e-4 * np.abs(expected).max())
        assert torch.equal(factor.factor_II, factor.factor_II.triu())


def test_dead_columns_do_not_touch_the_factor_of_the_others() -> None:
    moment = make_layer(2, 12).moment
    moment[[3, 7]], moment[:, [3, 7]] = 0, 0
    factor = inverse_factor(moment)
    assert factor.dead_I.nonzero()[:, 0].tolist() == [3, 7]
    expected = plain_factor(moment)
    np.testing.assert_allclose(factor.factor_II.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_a_scaled_moment_scales_the_factor() -> None:
    moment = make_layer(2, 40).moment
    for scale in (1e-12, 1e12):
        ratio = inverse_factor(moment * scale).factor_II * scale**0.5
        torch.testing.assert_close(ratio, inverse_factor(moment).factor_II, rtol=1e-3, atol=1e-5)


def test_a_moment_of_low_rank_is_damped_enough() -> None:
    x = torch.randn(3, 90, generator=torch.Generator().manual_seed(0))
    factor = inverse_factor(x.T @ x)
    assert factor.share == DAMPING and torch.isfinite(factor.factor_II).all()


def test_more_damping_is_tried_and_reported() -> None:
    moment = torch.eye(6)
    moment[0, 1] = moment[1, 0] = 1.05  # not positive definite: no moment is, but sums in low precision can be
    factor = inverse_factor(moment)
    assert factor.share == pytest.approx(0.1) and factor.damping == pytest.approx(0.1)
    assert torch.isfinite(factor.factor_II).all()
    weight = make_layer(3, 6).weight
    assert prune_obs(weight, moment, 9).damping == pytest.approx(0.1)
    assert prune_obs_groups(weight, moment, 1, 3).damping == pytest.approx(0.1)
    assert prune_obs(weight, torch.eye(6), 9).damping == DAMPING


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    moment = torch.eye(4)
    moment[2, 1] = bad
    with pytest.raises(ValueError, match=r"^the second moment is not finite$"):
        inverse_factor(moment)


def test_a_hopeless_moment_is_refused_in_one_line() -> None:
    moment = torch.eye(4)
    moment[0, 1] = moment[1, 0] = 1e9
    with pytest.raises(ValueError, match=r"^the second moment is not positive definite, not even with damping 100$"):
        inverse_factor(moment)


def test_an_all_zero_moment_is_all_dead() -> None:
    factor = inverse_factor(torch.zeros(5, 5))
    assert factor.dead_I.all() and torch.equal(factor.factor_II, torch.eye(5))


def test_the_triangular_inverse_at_every_size() -> None:
    for n in (1, 63, 64, 65, 131, 200):
        lower = torch.randn(n, n, generator=torch.Generator().manual_seed(n)).tril() * 0.1 + torch.eye(n)
        torch.testing.assert_close(invert_lower(lower) @ lower, torch.eye(n), atol=1e-4, rtol=0)


SHAPES = [(6, 5), (1, 40), (9, 127), (3, 128), (5, 129), (4, 300), (24, 256), (1, 1)]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.45, 0.8, 1.0])
def test_it_is_the_published_loop(rows: int, columns: int, sparsity: float, two_sided: bool) -> None:
    layer = make_layer(rows, columns)
    zeros = round(sparsity * layer.weight.numel())
    gamma = layer.gamma if two_sided else None
    pruned = prune_obs(layer.weight, layer.moment, zeros, gradient_square_O=gamma)
    expected = plain_loop(layer, plain_quotas(layer, zeros), gamma)
    assert int((~pruned.keep_OI).sum()) == zeros
    assert torch.equal(pruned.weight_OI != 0, pruned.keep_OI)
    assert_equal(pruned.weight_OI, better_rows(layer, expected))


def better_rows(layer: Layer, updated: Array, keep: Tensor | None = None) -> Array:
    """Rows which the published loop leaves worse than its mask alone are those of the mask."""
    stays = updated != 0 if keep is None else keep.numpy()
    masked = np.where(stays, layer.weight.double().numpy(), 0.0)
    worse = true_errors(updated, layer) > true_errors(masked, layer)
    return np.where(worse[:, None], masked, updated)


@pytest.mark.parametrize(
    ("pruned", "group", "columns"), [(2, 4, 300), (4, 8, 264), (1, 3, 129), (5, 10, 40), (70, 140, 280)]
)
def test_groups_are_chosen_where_the_published_loop_comes_to_them(pruned: int, group: int, columns: int) -> None:
    layer = make_layer(7, columns)
    result = prune_obs_groups(layer.weight, layer.moment, pruned, group)
    assert ((~result.keep_OI).reshape(-1, group).sum(1) == pruned).all()
    assert_equal(result.weight_OI, better_rows(layer, plain_loop(layer, [pruned], None, group)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("pruned", "group"), [(2, 4), (1, 4), (3, 10)])
def test_groups_of_layers_that_are_sparse_already(pruned: int, group: int, rows: int, dtype: torch.dtype) -> None:
    layer = make_layer(rows, 160)
    layer.weight[torch.rand(rows, 160, generator=torch.Generator().manual_seed(3)) < 0.3] = 0
    layer.weight[:, 20:40] = 0  # more than any group may lose
    layer.moment[[3, 50, 51]], layer.moment[:, [3, 50, 51]] = 0, 0
    layer = layer._replace(weight=layer.weight.to(dtype))
    result = prune_obs_groups(layer.weight, layer.moment, pruned, group)
    assert ((~result.keep_OI).reshape(-1, group).sum(1) == pruned).all()
    expected = better_rows(layer, plain_loop(layer, [pruned], None, group), result.keep_OI)
    tolerance = 2e-4 if dtype == torch.float32 else 4e-3
    np.testing.assert_allclose(result.weight_OI.double().numpy(), expected, atol=tolerance * np.abs(expected).max())
    # What stays though it is zero may be filled, but is never made up.
    lost = (result.weight_OI == 0) & result.keep_OI
    assert not layer.weight[lost].any()


def test_groups_must_divide_the_inputs() -> None:
    layer = make_layer(2, 10)
    with pytest.raises(ValueError, match=r"^10 inputs are not divisible into groups of 4$"):
        prune_obs_groups(layer.weight, layer.moment, 2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_updated_in_fp32(dtype: torch.dtype) -> None:
    layer = make_layer(8, 140)
    layer = layer._replace(weight=layer.weight.to(dtype))
    result = prune_obs(layer.weight, layer.moment, 500)
    assert result.weight_OI.dtype == dtype
    exact = prune_obs(layer.weight.float(), layer.moment, 500)
    assert torch.equal(result.keep_OI, exact.keep_OI)
    assert torch.equal(result.weight_OI, exact.weight_OI.to(dtype))


def test_exact_zeros_go_first_and_stay_zero() -> None:
    layer = make_layer(6, 300)
    layer.weight[torch.rand(6, 300, generator=torch.Generator().manual_seed(3)) < 0.3] = 0
    layer.weight[:, 140:180] = 0  # more than the second block's share
    exact = layer.weight == 0
    zeros = int(exact.sum()) + 100
    result = prune_obs(layer.weight, layer.moment, zeros)
    assert int((result.weight_OI == 0).sum()) == zeros
    assert not result.keep_OI[exact].any()
    quotas = [int((~result.keep_OI[:, start : start + 128]).sum()) for start in (0, 128, 256)]
    assert_equal(result.weight_OI, better_rows(layer, plain_loop(layer, quotas, None)))


def test_as_many_zeros_as_the_layer_has_change_nothing() -> None:
    layer = make_layer(6, 130)
    layer.weight[:, ::2] = 0
    result = prune_obs(layer.weight, layer.moment, int((layer.weight == 0).sum()))
    assert torch.equal(result.weight_OI, layer.weight)


def test_dead_columns_go_before_others_and_disturb_none() -> None:
    layer = make_layer(5, 150)
    layer.moment[[3, 140]], layer.moment[:, [3, 140]] = 0, 0
    result = prune_obs(layer.weight, layer.moment, 300)
    assert not result.keep_OI[:, [3, 140]].any()
    assert_equal(result.weight_OI, better_rows(layer, plain_loop(layer, plain_quotas(layer, 300), None)))


def test_more_dead_columns_than_zeros_still_give_the_exact_count() -> None:
    layer = make_layer(4, 140)
    dead = torch.arange(0, 140, 2)
    layer.moment[dead], layer.moment[:, dead] = 0, 0
    layer.weight[1, 5] = 0
    result = prune_obs(layer.weight, layer.moment, 40)
    assert int((~result.keep_OI).sum()) == 40 and not result.keep_OI[1, 5]
    assert int((~result.keep_OI[:, dead]).sum()) == 39
    assert torch.equal(result.weight_OI, layer.weight * result.keep_OI)  # no update: nothing was lost


def test_ties_go_by_column_then_row() -> None:
    layer = make_layer(3, 6)._replace(weight=torch.ones(3, 6), moment=torch.eye(6))
    keep = prune_obs(layer.weight, layer.moment, 7).keep_OI
    assert (~keep).T.flatten().tolist() == [True] * 7 + [False] * 11
    groups = prune_obs_groups(layer.weight, layer.moment, 1, 3).keep_OI
    assert groups.tolist() == [[False, True, True] * 2] * 3


def test_impossible_counts_are_refused_in_one_line() -> None:
    layer = make_layer(2, 6)
    layer.weight[0, :4] = 0
    with pytest.raises(ValueError, match=r"^3 zeros asked of a layer that has 4 already$"):
        prune_obs(layer.weight, layer.moment, 3)
    with pytest.raises(ValueError, match=r"^13 zeros asked of a layer of 12 weights$"):
        prune_obs(layer.weight, layer.moment, 13)


def test_weights_and_gammas_that_are_not_finite_are_refused() -> None:
    layer = make_layer(4, 8)
    with pytest.raises(ValueError, match="not finite"):
        prune_obs(layer.weight, layer.moment, 8, gradient_square_O=layer.gamma * torch.nan)
    layer.weight[1, 1] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        prune_obs(layer.weight, layer.moment, 8)


def test_a_factor_at_hand_is_used() -> None:
    layer = make_layer(6, 30)
    factor = inverse_factor(layer.moment)
    given_factor = prune_obs(layer.weight, layer.moment, 90, factor=factor)
    assert torch.equal(given_factor.weight_OI, prune_obs(layer.weight, layer.moment, 90).weight_OI)
    other = InverseFactor(torch.eye(30), factor.dead_I, 0.0, DAMPING)  # no correlation: nothing is updated
    kept = prune_obs(layer.weight, layer.moment, 90, factor=other)
    assert torch.equal(kept.weight_OI, layer.weight * kept.keep_OI)


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.booleans())
def test_no_row_is_worse_than_its_mask_alone(seed: int, rows: int, columns: int, sparsity: float, half: bool) -> None:
    layer = make_layer(rows, columns, seed, tokens=1 + seed % 60)
    if half:
        layer = layer._replace(weight=layer.weight.bfloat16())
    result = prune_obs(layer.weight, layer.moment, round(sparsity * layer.weight.numel()))
    masked = true_errors((layer.weight * result.keep_OI).double().numpy(), layer)
    updated = true_errors(result.weight_OI.double().numpy(), layer)
    assert (updated <= masked * (1 + 1e-3) + 1e-7 * float(layer.moment.diagonal().sum())).all()


def test_a_row_that_the_loop_spoils_falls_back_to_its_mask() -> None:
    # Columns 1 and 2 are almost opposite: 1 takes over from 0 counting on 2, and then 2 goes.
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = x[:, 0] * 0.3 - x[:, 1] + 0.05 * x[:, 2]
    layer = Layer(torch.tensor([[1.0, 0.05, 0.04]]), (x.T @ x / 4000).float(), torch.ones(1))
    keep = torch.tensor([[False, True, False]])
    plain = plain_loop_with(layer, keep)
    masked = (layer.weight * keep).double().numpy()
    assert true_errors(plain, layer) > true_errors(masked, layer)  # the published loop does lose here
    finished = finish_update(torch.from_numpy(plain).float(), layer.weight, keep, layer.moment)
    assert torch.equal(finished, layer.weight * keep)


def plain_loop_with(layer: Layer, keep: Tensor) -> Array:
    """The published loop for a given mask."""
    weight, u = layer.weight.double().numpy().copy(), plain_factor(layer.moment)
    for j in range(weight.shape[1]):
        error = np.where(keep[:, j].numpy(), 0.0, weight[:, j]) / u[j, j]
        weight[:, j:] -= np.outer(error, u[j, j:])
    return np.where(keep.numpy(), weight, 0.0)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """(sizes, exact, free, zeros) of a few blocks."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    free = [draw(st.integers(0, size)) for size in sizes]
    exact = [draw(st.integers(0, f)) for f in free]
    return sizes, exact, free, draw(st.integers(sum(exact), sum(sizes)))


@given(blocks())
def test_zeros_are_split_exactly(case: tuple[list[int], list[int], list[int], int]) -> None:
    sizes, exact, free, zeros = case
    quotas = split_zeros(zeros, sizes=sizes, exact=exact, free=free)
    assert sum(quotas) == zeros
    assert all(e <= q <= n for e, q, n in zip(exact, quotas, sizes, strict=True))
    if zeros >= sum(free):
        assert all(q >= f for q, f in zip(quotas, free, strict=True))
        # Blocks that lose more than what is free all lose the same share, to within a weight.
        shares = [(q - 1) / n for q, f, n in zip(quotas, free, sizes, strict=True) if q > f]
        assert all(share * n <= q + 1 for share in shares for q, n in zip(quotas, sizes, strict=True))
    else:
        assert all(q <= f for q, f in zip(quotas, free, strict=True))


def test_arguments_and_threads_are_left_alone() -> None:
    layer = make_layer(4, 140)
    copies, threads = [t.clone() for t in layer], torch.get_num_threads()
    prune_obs(layer.weight, layer.moment, 200, gradient_square_O=layer.gamma)
    assert all(torch.equal(a, b) for a, b in zip(layer, copies, strict=True))
    assert torch.get_num_threads() == threads


def test_a_transposed_view_gives_the_same() -> None:
    layer = make_layer(7, 9)
    view = layer.weight.T.contiguous().T
    assert torch.equal(prune_obs(view, layer.moment, 30).weight_OI, prune_obs(layer.weight, layer.moment, 30).weight_OI)
