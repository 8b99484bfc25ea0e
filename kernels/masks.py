"""Which weights stay: exact counts, ties broken by position.

Shape suffixes: O output features (rows), I input features (columns).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.dispatch import choose_kernel
from kernels.ranks import kth_smallest, order_preserving_ints, score_bits
from kernels.scores import score_wanda


def keep_highest(score_OI: Tensor, dead_OI: Tensor, zeros: int) -> Tensor:
    """Mask (bool, True = stays) of a layer with exactly `zeros` lowest scores removed.

    Weights marked `dead_OI` (exact zeros, or a mask that is to grow) go first; ties go in row-major order, as a
    stable sort would.
    """
    if choose_kernel(score_OI.device) == "triton":
        ranks_N = order_preserving_ints(score_OI, dead_OI).reshape(1, -1)
        return _keep_above(ranks_N, torch.tensor([zeros], device=ranks_N.device)).reshape(score_OI.shape)
    ranks_OI = score_bits(score_OI).mul_(~dead_OI)  # times a mask: `where` is slower
    # As one great tie the dead ones would cost the partition ten times its usual time: each has a place of its own.
    below_N = torch.arange(-ranks_OI.numel(), 0, dtype=torch.int32, device=ranks_OI.device)
    ranks_OI += below_N.reshape(ranks_OI.shape).mul_(dead_OI)
    return _remove_lowest(ranks_OI.reshape(1, -1), zeros).reshape(score_OI.shape)


def keep_highest_of_rows(score_OI: Tensor, dead_OI: Tensor, zeros: int) -> Tensor:
    """Mask (bool, True = stays) with the lowest scores of each row removed, `zeros` in the whole layer.

    Every row loses the same number; what `zeros` leaves over after division goes to the rows whose next score
    is lowest. A row that holds more exact zeros than its share keeps them, and the others lose less for it, so that
    the count over the layer is exact. Ties inside a row go by column. Raises ValueError when the layer has more exact
    zeros than `zeros` already.
    """
    ranks_OI = order_preserving_ints(score_OI, dead_OI)
    zeros_O = _share_among_rows(dead_OI, zeros, lambda k: kth_smallest(ranks_OI, k))
    return _keep_above(ranks_OI, zeros_O)


def keep_wanda(weight_OI: Tensor, mean_square_I: Tensor, zeros: int) -> Tensor:
    """`keep_highest_of_rows` of Wanda's scores, exact zeros of the weight being dead; on a GPU in one step."""
    dead_OI = weight_OI == 0
    if choose_kernel(weight_OI.device) == "triton":
        from kernels import triton_masks

        if weight_OI.shape[1] <= triton_masks.WIDEST_ROW:
            norm_I = mean_square_I.float().sqrt() + 0.0  # the root of -0.0 is -0.0
            select = partial(triton_masks.select_wanda, weight_OI, norm_I)
            zeros_O = _share_among_rows(dead_OI, zeros, lambda k: select(torch.full((len(dead_OI),), k))[0])
            return select(zeros_O)[1]
    return keep_highest_of_rows(score_wanda(weight_OI, mean_square_I), dead_OI, zeros)


def _share_among_rows(dead_OI: Tensor, zeros: int, select: Callable[[int], Tensor]) -> Tensor:
    """How many each row loses; `select(k)` is the k-th smallest rank of each."""
    dead_O = dead_OI.sum(1)
    if int(dead_O.sum()) > zeros:
        raise ValueError(f"{zeros} zeros asked of a layer that has {int(dead_O.sum())} already")
    share = _fill_rows(dead_O, zeros, dead_OI.shape[1])
    zeros_O = dead_O.clamp(min=share)
    rest = zeros - int(zeros_O.sum())
    if rest:
        next_O = select(share + 1).long()
        next_O[dead_O > share] = torch.iinfo(torch.int64).max
        zeros_O[torch.sort(next_O, stable=True).indices[:rest]] += 1
    return zeros_O


def _fill_rows(dead_O: Tensor, zeros: int, columns: int) -> int:
    """The greatest k with sum over rows of max(k, dead) at most `zeros`."""
    low, high = 0, columns
    while low < high:
        k = (low + high + 1) // 2
        low, high = (k, high) if int(dead_O.clamp(min=k).sum()) <= zeros else (low, k - 1)
    return low


def _keep_above(ranks_RN: Tensor, zeros_R: Tensor) -> Tensor:
    """Remove the `zeros_R[r]` lowest of each row r, ties by column."""
    if choose_kernel(ranks_RN.device) == "triton":
        from kernels import triton_masks

        return triton_masks.remove_lowest(ranks_RN, zeros_R)
    counts = torch.unique(zeros_R).tolist()
    if len(counts) == 1:
        return _remove_lowest(ranks_RN, counts[0])
    keep_RN = torch.empty_like(ranks_RN, dtype=torch.bool)
    for count in counts:
        rows = (zeros_R == count).nonzero()[:, 0]
        keep_RN[rows] = _remove_lowest(ranks_RN[rows], count)
    return keep_RN


def _remove_lowest(ranks_RN: Tensor, count: int) -> Tensor:
    """Remove the `count` lowest of every row, ties by column."""
    if count == 0:
        return torch.ones_like(ranks_RN, dtype=torch.bool)
    threshold_R1 = kth_smallest(ranks_RN, count)[:, None]
    keep_RN = ranks_RN > threshold_R1
    rows, columns = keep_RN.shape
    if int(torch.count_nonzero(keep_RN)) == rows * (columns - count):
        return keep_RN
    surplus_R = count - (~keep_RN).sum(1)  # negative where ties at the threshold would remove too many
    for row in (surplus_R < 0).nonzero()[:, 0].tolist():
        tied = (ranks_RN[row] == threshold_R1[row]).nonzero()[:, 0]
        keep_RN[row, tied[int(surplus_R[row]) :]] = True
    return keep_RN
