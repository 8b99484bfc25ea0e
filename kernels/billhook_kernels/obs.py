"""Optimal brain surgery on all rows of a layer, column by column: SparseGPT (arXiv 2301.00774).

Shape suffixes: O output features (rows), I input features (columns), B columns of a block, M columns of an N:M group.
Inside the loop a layer lies transposed (IO), so that a column of the weight is contiguous in memory.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.dispatch import one_thread
from billhook_kernels.guard import DAMPING, Pruned, escalate, finish_update, is_finite
from billhook_kernels.masks import check_group, keep_highest, keep_highest_of_columns, order_preserving_ints

BASE = 128
"""Rows that LAPACK factors, on one thread; above, triangular solves and products do, which MKL keeps to the bit."""


def factor_lower(matrix_NN: Tensor) -> tuple[Tensor, bool]:
    """(L with L L^T = the matrix, whether it is positive definite); fp32, of the lower half. L is a new tensor.

    By halves on the CPU, as LAPACK's own recursive version (Gustavson 1997); in one call on a GPU.
    """
    if matrix_NN.device.type != "cpu" or len(matrix_NN) <= BASE:
        with one_thread(matrix_NN.device):
            lower_NN, failed = torch.linalg.cholesky_ex(matrix_NN)
        return lower_NN, int(failed) == 0
    half = len(matrix_NN) // 2
    lower_NN = torch.zeros_like(matrix_NN)
    first, positive = factor_lower(matrix_NN[:half, :half])
    if positive:
        below = torch.linalg.solve_triangular(first, matrix_NN[half:, :half].T, upper=False).T
        last, positive = factor_lower(matrix_NN[half:, half:] - below @ below.T)
        lower_NN[:half, :half], lower_NN[half:, :half], lower_NN[half:, half:] = first, below, last
    return lower_NN, positive


BLOCK = 128
"""Columns whose mask is chosen at once, and after which the columns to the right are updated (SparseGPT's B)."""
INNER = 16
"""Columns updated one by one before the rest of their block is."""

Choose = Callable[[Tensor, int, int], Tensor]
"""Which weights go: (present weights of columns start..end, transposed; start; end) to bool, True = goes."""


class InverseFactor(NamedTuple):
    """(A + damping I)^-1 = U^T U, with H_jj = 1 where a_j = 0."""

    factor_II: Tensor
    """U, upper triangular, fp32."""
    dead_I: Tensor
    """bool: columns whose input is always zero."""
    damping: float
    """What was added to A's diagonal."""
    share: float
    """The damping as a share of mean(diag A): DAMPING, or more where that failed."""


def inverse_factor(second_moment_II: Tensor) -> InverseFactor:
    """The upper Cholesky factor of H^-1, H = A + share * mean(diag A) * I; fp32, never NaN.

    `second_moment_II` is A in any float dtype. H is factored from its last row up, H = R R^T with R upper, so that
    U = R^-1: one Cholesky and one triangular inverse instead of the usual Cholesky, inverse and Cholesky. Unlike the
    published code, dead columns do not count in the mean as ones: the damping does not depend on A's scale.

    The share is DAMPING, and escalates when H is not positive definite in fp32; the result says which was used. Raises
    ValueError when A is not finite or nothing helps.
    """
    moment_II = second_moment_II.float()
    diagonal_I = moment_II.diagonal()
    if not is_finite(moment_II):
        raise ValueError("the second moment is not finite")
    dead_I = diagonal_I == 0
    mean = float(diagonal_I.mean())
    for share in escalate(DAMPING):
        hessian_II = moment_II.flip(0, 1)
        hessian_II.diagonal().add_(share * mean).masked_fill_(dead_I.flip(0), 1.0)
        lower_II, positive = factor_lower(hessian_II)
        del hessian_II  # of a wide layer each of these is among the largest tensors of a run
        if positive:
            inverse_II = invert_lower(lower_II)
            del lower_II
            factor_II = inverse_II.flip(0, 1)
            del inverse_II
            if is_finite(factor_II):
                return InverseFactor(factor_II, dead_I, share * mean, share)
    raise ValueError(f"the second moment is not positive definite, not even with damping {share:g}")


def invert_lower(lower_NN: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: mostly matrix products, which run faster than solves."""
    n = len(lower_NN)
    if n <= (64 if lower_NN.device.type == "cpu" else 1024):
        eye_NN = torch.eye(n, dtype=lower_NN.dtype, device=lower_NN.device)
        solved_NN: Tensor = torch.linalg.solve_triangular(lower_NN, eye_NN, upper=False)
        return solved_NN
    half = n // 2
    inverse_NN = torch.zeros_like(lower_NN)
    first, last = invert_lower(lower_NN[:half, :half]), invert_lower(lower_NN[half:, half:])
    inverse_NN[:half, :half], inverse_NN[half:, half:] = first, last
    inverse_NN[half:, :half] = (last @ (lower_NN[half:, :half] @ first)).neg_()
    return inverse_NN


def prune_obs(
    weight_OI: Tensor,
    second_moment_II: Tensor,
    zeros: int,
    *,
    gradient_square_O: Tensor | None = None,
    factor: InverseFactor | None = None,
) -> Pruned:
    """SparseGPT (arXiv 2301.00774, algorithm 1): exactly `zeros` zeros in the layer, the survivors updated.

    Every block of BLOCK columns gets its share of the zeros: those of lowest W_ij^2 / U_jj^2 over the rows x block, on
    the weights as updated so far; with `gradient_square_O` (gamma) of lowest W_ij^2 / U_jj^2 * gamma_i, "two-sided
    OBS". Exact zeros of the dense weight go first, then the weights of dead columns, then the rest, ties by column,
    then row. A block that has more of the first two than its share gives them all, and the others less, so that the
    count over the layer is exact; dead columns are zeroed as published as far as `zeros` allows.

    Rows which the update leaves worse than the mask alone are the masked dense rows (`keep_better_rows`).
    `factor` is `inverse_factor(second_moment_II)` if it is at hand. Raises ValueError when the layer has more exact
    zeros than `zeros`, fewer weights, or statistics that are not finite.
    """
    factor = factor or inverse_factor(second_moment_II)
    rows, columns = weight_OI.shape
    exact_IO = (weight_OI == 0).T.contiguous()
    exact_I = exact_IO.sum(1)
    starts = [*range(0, columns, BLOCK), columns]
    quotas = split_zeros(
        zeros,
        sizes=[(end - start) * rows for start, end in pairwise(starts)],
        exact=_sum_blocks(exact_I, starts),
        free=_sum_blocks(exact_I.masked_fill(factor.dead_I, rows), starts),
    )
    scale_I, scale_O = _column_scale(factor), _row_scale(gradient_square_O)

    def choose(block_BO: Tensor, start: int, end: int) -> Tensor:
        score_BO = block_BO.abs().mul_(scale_I[start:end, None])
        if scale_O is not None:
            score_BO.mul_(scale_O)
        return ~keep_highest(score_BO, exact_IO[start:end], quotas[start // BLOCK])

    return _sweep(weight_OI, second_moment_II, factor, choose, BLOCK)


def prune_obs_groups(
    weight_OI: Tensor,
    second_moment_II: Tensor,
    pruned: int,
    group: int,
    *,
    factor: InverseFactor | None = None,
) -> Pruned:
    """SparseGPT with an N:M pattern: `pruned` of every `group` consecutive inputs zeroed, the survivors updated.

    The mask of a group is chosen when the loop comes to it, by W_ij^2 / U_jj^2 on the weights as updated so far.
    Two-sided OBS is the same here: gamma_i is one factor for all the weights of a group. Exact zeros of the dense
    weight go first, then the weights of dead columns; ties by column. Rows which the update leaves worse than the
    mask alone are the masked dense rows. Raises ValueError when `group` does not divide d_in.
    """
    check_group(weight_OI.shape[1], pruned, group)
    factor = factor or inverse_factor(second_moment_II)
    exact_IO = (weight_OI == 0).T.contiguous()
    scale_I = _column_scale(factor)

    def choose(group_MO: Tensor, start: int, end: int) -> Tensor:
        score_MO = group_MO.abs().mul_(scale_I[start:end, None])
        return ~keep_highest_of_columns(order_preserving_ints(score_MO, exact_IO[start:end]), pruned)

    return _sweep(weight_OI, second_moment_II, factor, choose, group)


def split_zeros(zeros: int, *, sizes: Sequence[int], exact: Sequence[int], free: Sequence[int]) -> list[int]:
    """How many of `zeros` each block loses: the same share of its size, but all its `free` ones if these are more.

    `exact` are the zeros each block has already, `free` those and what costs nothing besides. When `zeros` do not
    suffice for all that is free, each block loses its exact zeros and the same share of the rest of the free ones.
    Raises ValueError when `zeros` are fewer than the exact zeros, or more than the weights.
    """
    if sum(exact) > zeros:
        raise ValueError(f"{zeros} zeros asked of a layer that has {sum(exact)} already")
    if sum(sizes) < zeros:
        raise ValueError(f"{zeros} zeros asked of a layer of {sum(sizes)} weights")
    if sum(free) >= zeros:
        rest = _apportion(zeros - sum(exact), [f - e for f, e in zip(free, exact, strict=True)])
        return [e + r for e, r in zip(exact, rest, strict=True)]
    quotas, closed = list(free), [False] * len(sizes)
    while True:  # every turn closes a block, or is the last
        open_sizes = [0 if c else n for n, c in zip(sizes, closed, strict=True)]
        shares = _apportion(zeros - sum(f for f, c in zip(free, closed, strict=True) if c), open_sizes)
        full = [not c and f > s for f, s, c in zip(free, shares, closed, strict=True)]
        if not any(full):
            return [q if c else s for q, s, c in zip(quotas, shares, closed, strict=True)]
        closed = [c or f for c, f in zip(closed, full, strict=True)]


def _apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in proportion to `sizes`, whole numbers, exact in sum, none more than its size."""
    whole = max(sum(sizes), 1)
    ends = [total * end // whole for end in accumulate(sizes, initial=0)]
    return [after - before for before, after in pairwise(ends)]


def _sum_blocks(count_I: Tensor, starts: list[int]) -> list[int]:
    counts = count_I.tolist()
    return [sum(counts[start:end]) for start, end in pairwise(starts)]


def _column_scale(factor: InverseFactor) -> Tensor:
    """1 / U_jj up to a factor, 0 in dead columns: times |W| it orders like W^2 / U_jj^2, and stays in fp32's range."""
    diagonal_I = factor.factor_II.diagonal()
    return (diagonal_I.mean() / diagonal_I).masked_fill(factor.dead_I, 0.0)


def _row_scale(gradient_square_O: Tensor | None) -> Tensor | None:
    """sqrt(gamma) up to a factor."""
    if gradient_square_O is None:
        return None
    gamma_O = gradient_square_O.float()
    return (gamma_O / gamma_O.mean().clamp(min=1e-30)).sqrt()


def _sweep(weight_OI: Tensor, second_moment_II: Tensor, factor: InverseFactor, choose: Choose, span: int) -> Pruned:
    """The column loop. `choose` is asked once for every `span` columns, when the loop comes to them.

    Two levels of lazy updates: a column is corrected at once for those INNER columns it stands among, by matrix
    products for the rest of its block, and for all columns to the right when the block is done.
    """
    columns = weight_OI.shape[1]
    inner = span * max(1, INNER // span) if span < BLOCK else INNER
    block = span if span >= BLOCK else inner * max(1, BLOCK // inner)
    work_IO = weight_OI.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    goes_IO = torch.empty(work_IO.shape, dtype=torch.bool, device=work_IO.device)
    loss_O = torch.zeros(work_IO.shape[1], device=work_IO.device)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        u_BB = factor.factor_II[start:end, start:end]
        with one_thread(work_IO.device):
            error_BO = _sweep_block(work_IO[start:end], goes_IO[start:end], u_BB, choose, start, span, inner)
        work_IO[end:].addmm_(factor.factor_II[start:end, end:].T, error_BO, alpha=-1)
        error_BO[factor.dead_I[start:end]] = 0
        loss_O += error_BO.square().sum(0)
    fitted_OI = work_IO.masked_fill_(goes_IO, 0.0).T.contiguous()
    keep_OI = goes_IO.logical_not_().T.contiguous()
    # The sum of err^2 is the damped error (w - w0)^T H (w - w0), as w - w0 = -err U: so a bound on the true error of
    # most rows costs nothing. It is a sum in fp32, hence the margin.
    updated_OI = finish_update(fitted_OI, weight_OI, keep_OI, second_moment_II, bound_O=loss_O * (1 + 1e-4))
    return Pruned(updated_OI, keep_OI, factor.share)


def _sweep_block(
    work_BO: Tensor, goes_BO: Tensor, u_BB: Tensor, choose: Choose, start: int, span: int, inner: int
) -> Tensor:
    """One block of the loop, in place; returns err = (w - q) / U_jj of its columns."""
    size = len(work_BO)
    error_BO, scale_BO, minus_u_BB = torch.empty_like(work_BO), torch.empty_like(work_BO), -u_BB
    works, errors, scales = work_BO.unbind(), error_BO.unbind(), scale_BO.unbind()
    inverse_B1 = u_BB.diagonal().reciprocal()[:, None]
    for low in range(0, size, inner):
        high = min(low + inner, size)
        for j in range(low, high):
            if j % span == 0:
                chosen = slice(j, min(j + span, size))
                goes_BO[chosen] = choose(work_BO[chosen], start + j, start + chosen.stop)
                torch.mul(goes_BO[chosen], inverse_B1[chosen], out=scale_BO[chosen])
            torch.mul(works[j], scales[j], out=errors[j])
            if j + 1 < high:
                work_BO[j + 1 : high].addr_(minus_u_BB[j, j + 1 : high], errors[j])
        if high < size:
            work_BO[high:].addmm_(minus_u_BB[low:high, high:].T, error_BO[low:high])
    return error_BO
