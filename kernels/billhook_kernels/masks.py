"""Which weights stay: exact counts, ties broken by position.

Shape suffixes: O output features (rows), I input features (columns).
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billhook_kernels.dispatch import INFINITY, NO_SCORE, choose_kernel, share_rows


def score_wanda(weight_OI: Tensor, mean_square_I: Tensor) -> Tensor:
    """|W_ij| * sqrt(a_j), fp32 (Wanda, arXiv 2306.11695 eq. 1), a = mean square of each input over tokens."""
    return weight_OI.float().abs() * mean_square_I.float().sqrt()


def score_two_sided(weight_OI: Tensor, mean_square_I: Tensor, gradient_square_O: Tensor) -> Tensor:
    """W_ij^2 * a_j * gamma_i, fp32: the diagonal second-order change of the loss, up to a factor.

    a and gamma are brought near 1 first, so that the product stays inside fp32's range. By a power of two: that rounds
    nothing, so that the order of the weights, ties too, does not hang on how a machine sums up the mean.
    """
    return weight_OI.float().square() * _scale(mean_square_I) * _scale(gradient_square_O)[:, None]


def _scale(square: Tensor) -> Tensor:
    square = square.float()
    return torch.ldexp(square, -torch.frexp(square.mean().clamp(min=1e-30)).exponent)


def score_bits(score: Tensor) -> Tensor:
    """Non-negative int32, a new tensor, that sort like the non-negative scores (fp32).

    Non-negative IEEE floats order like their bits. Raises ValueError when a score is negative or not finite.
    """
    bits = (score.float() + 0.0).contiguous().view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    if bits.numel() and (int(bits.min()) < 0 or int(bits.max()) >= INFINITY):
        raise ValueError(NO_SCORE)
    return bits


def order_preserving_ints(score: Tensor, dead: Tensor) -> Tensor:
    """`score_bits`, but `dead` weights are 0 and all others above it."""
    return score_bits(score).add_(1).mul_(~dead)


BLOCK_BYTES = 2**20
"""Of scores that a thread works on at a time: with their ranks and their mask they fit into the cache of a core."""


def kth_smallest(ranks_RN: Tensor, k: int) -> Tensor:
    """The k-th smallest (k from 1) of each row of ranks that are at least 0: shape (R,)."""
    if choose_kernel(ranks_RN.device) == "triton":
        from billhook_kernels import triton_masks

        return triton_masks.select_kth(ranks_RN, k)
    if ranks_RN.device.type == "cpu":  # numpy's partition is several times faster than torch.kthvalue here
        return torch.from_numpy(np.partition(ranks_RN.numpy(), k - 1, axis=1)[:, k - 1].copy())
    return torch.kthvalue(ranks_RN, k, dim=1).values


def kth_smallest_each(ranks_N: Tensor, counts: Sequence[int]) -> Tensor:
    """The k-th smallest of ranks that are at least 0, for each k of `counts`; -1, which none is below, for 0."""
    if ranks_N.device.type != "cpu" or choose_kernel(ranks_N.device) == "triton":
        none = ranks_N.new_tensor(-1)
        return torch.stack([kth_smallest(ranks_N[None], k)[0] if k else none for k in counts])
    # the k smallest stand first once they are found, and those of any lower k are among them
    held_N, end, found = ranks_N.numpy().copy(), len(ranks_N), {0: -1}
    for k in sorted({*counts} - {0}, reverse=True):
        held_N[:end].partition(k - 1)
        found[k], end = int(held_N[k - 1]), k
    return ranks_N.new_tensor([found[k] for k in counts])


def keep_highest(score_OI: Tensor, dead_OI: Tensor, zeros: int) -> Tensor:
    """Mask (bool, True = stays) of a layer with exactly `zeros` lowest scores removed.

    Weights marked `dead_OI` (exact zeros, or a mask that is to grow) go first; ties go in row-major order, as a
    stable sort would.
    """
    if choose_kernel(score_OI.device) == "triton":
        ranks_N = order_preserving_ints(score_OI, dead_OI).reshape(1, -1)
        return _keep_above(ranks_N, torch.tensor([zeros], device=ranks_N.device)).reshape(score_OI.shape)
    ranks_OI, dead = score_bits(score_OI), int(torch.count_nonzero(dead_OI))
    alive_OI = ~dead_OI
    if zeros <= dead:
        return alive_OI | (dead_OI.reshape(-1).cumsum(0) > zeros).reshape(dead_OI.shape)
    # The dead as one great tie would cost the partition ten times its usual time: only the others are sorted.
    picked_N = _pick(ranks_OI, alive_OI) if dead else ranks_OI
    threshold = kth_smallest(picked_N.reshape(1, -1), zeros - dead)
    keep_OI = (ranks_OI > threshold).logical_and_(alive_OI)
    if lacking := keep_OI.numel() - zeros - int(torch.count_nonzero(keep_OI)):  # ties at the threshold
        tied_N = (ranks_OI == threshold).logical_and_(alive_OI).reshape(-1).nonzero()[:, 0]
        keep_OI.view(-1)[tied_N[-lacking:]] = True
    return keep_OI


def keep_highest_of_rows(score_OI: Tensor, dead_OI: Tensor, zeros: int) -> Tensor:
    """Mask (bool, True = stays) with the lowest scores of each row removed, `zeros` in the whole layer.

    Every row loses the same number; what `zeros` leaves over after division goes to the rows whose next score
    is lowest. A row that holds more exact zeros than its share keeps them, and the others lose less for it, so that
    the count over the layer is exact. Ties inside a row go by column. Raises ValueError when the layer has more exact
    zeros than `zeros` already.
    """
    if score_OI.device.type == "cpu" and choose_kernel(score_OI.device) != "triton":
        return _keep_rows_on_cpu(score_OI.float().contiguous(), dead_OI.contiguous(), zeros)
    ranks_OI = order_preserving_ints(score_OI, dead_OI)
    zeros_O = _share_among_rows(dead_OI.sum(1), zeros, ranks_OI.shape[1], lambda k: kth_smallest(ranks_OI, k))
    return _keep_above(ranks_OI, zeros_O)


def _keep_rows_on_cpu(score_OI: Tensor, dead_OI: Tensor, zeros: int) -> Tensor:
    """`keep_highest_of_rows`, a few rows at a time on each thread: all that is done to them is done in its cache."""
    (rows, columns), wrong = score_OI.shape, []
    score, dead = score_OI.numpy(), dead_OI.numpy()
    dead_O, keep = np.zeros(rows, dtype=np.int64), np.empty((rows, columns), dtype=bool)
    kth_O, before_O = np.empty((2, rows), dtype=np.int32)

    def by_blocks(work: Callable[[slice], None]) -> None:
        height = max(1, BLOCK_BYTES // (4 * max(columns, 1)))

        def run(first: int, last: int) -> None:
            for start in range(first, last, height):
                work(slice(start, min(start + height, last)))

        share_rows(run, rows, score.nbytes)

    def rank(part: slice) -> NDArray[np.int32]:
        """`order_preserving_ints`; to make them again costs less than to keep them."""
        bits = (score[part] + np.float32(0)).view(np.int32)
        if bits.size and (bits.min() < 0 or bits.max() >= INFINITY):
            wrong.append(part)
        bits += 1
        return np.multiply(bits, ~dead[part], out=bits) if dead[part].any() else bits

    def count_dead(part: slice) -> None:
        if dead[part].any():
            dead_O[part] = [np.count_nonzero(row) for row in dead[part]]  # along an axis it takes ten times as long

    selected = 0

    def select(k: int) -> Tensor:
        nonlocal selected
        selected = k

        def find(part: slice) -> None:
            ranks = rank(part)
            ranks.partition(k - 1, axis=1)
            kth_O[part], before_O[part] = ranks[:, k - 1], ranks[:, : k - 1].max(axis=1, initial=-1)

        by_blocks(find)
        return torch.from_numpy(kth_O)

    def remove(part: slice) -> None:
        ranks, threshold_R1, count_R = rank(part), threshold_O[part, None], zeros_O[part]
        kept = np.greater(ranks, threshold_R1, out=keep[part])
        if np.count_nonzero(kept) == kept.size - count_R.sum():
            return
        for row, count in enumerate(count_R.tolist()):  # ties at the threshold remove too many
            tied = np.flatnonzero(ranks[row] == threshold_R1[row])
            lacking = columns - count - np.count_nonzero(kept[row])
            kept[row, tied[len(tied) - lacking :]] = True

    by_blocks(count_dead)
    zeros_O = _share_among_rows(torch.from_numpy(dead_O), zeros, columns, select).numpy()
    if rows and columns:
        most = int(zeros_O[zeros_O > dead_O].max(initial=1))
        if selected != most:
            select(most)
        # The other rows lose their dead weights and no more, and those have rank 0.
        threshold_O = np.where(zeros_O == most, kth_O, np.where(zeros_O == most - 1, before_O, 0))
        by_blocks(remove)
    if wrong:
        raise ValueError(NO_SCORE)
    return torch.from_numpy(keep)


def keep_wanda(weight_OI: Tensor, mean_square_I: Tensor, zeros: int) -> Tensor:
    """`keep_highest_of_rows` of Wanda's scores, exact zeros of the weight being dead; on a GPU in one step."""
    dead_OI = weight_OI == 0
    if choose_kernel(weight_OI.device) == "triton":
        from billhook_kernels import triton_masks

        if weight_OI.shape[1] <= triton_masks.WIDEST_ROW:
            norm_I = mean_square_I.float().sqrt() + 0.0  # the root of -0.0 is -0.0
            select = partial(triton_masks.select_wanda, weight_OI, norm_I)
            dead_O, columns = dead_OI.sum(1), dead_OI.shape[1]
            zeros_O = _share_among_rows(dead_O, zeros, columns, lambda k: select(torch.full((len(dead_O),), k))[0])
            return select(zeros_O)[1]
    return keep_highest_of_rows(score_wanda(weight_OI, mean_square_I), dead_OI, zeros)


def _share_among_rows(dead_O: Tensor, zeros: int, columns: int, select: Callable[[int], Tensor]) -> Tensor:
    """How many each row loses; `select(k)` is the k-th smallest rank of each."""
    if int(dead_O.sum()) > zeros:
        raise ValueError(f"{zeros} zeros asked of a layer that has {int(dead_O.sum())} already")
    share = _fill_rows(dead_O, zeros, columns)
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


def _pick(ranks_OI: Tensor, chosen_OI: Tensor) -> Tensor:
    """The chosen ones in row-major order: shape (N,)."""
    if ranks_OI.device.type == "cpu":  # several times faster than torch's masked_select
        return torch.from_numpy(np.extract(chosen_OI.numpy(), ranks_OI.numpy()))
    return ranks_OI.masked_select(chosen_OI)


def _keep_above(ranks_RN: Tensor, zeros_R: Tensor) -> Tensor:
    """Remove the `zeros_R[r]` lowest of each row r, ties by column."""
    if choose_kernel(ranks_RN.device) == "triton":
        from billhook_kernels import triton_masks

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


Pattern = tuple[int, int]
"""(N zeroed, of M consecutive inputs)."""


def check_group(columns: int, pruned: int, group: int) -> None:
    """Raises ValueError in one line when `columns` inputs cannot be pruned `pruned` of `group`."""
    if not 0 <= pruned <= group or group < 1:
        raise ValueError(f"{pruned} zeros do not fit into a group of {group} inputs")
    if columns % group:
        raise ValueError(f"{columns} inputs are not divisible into groups of {group}")


def check_pattern(shape: torch.Size, zeros: int, pattern: Pattern) -> None:
    """Raises ValueError in one line when the pattern does not divide d_in, or gives other than `zeros` zeros."""
    pruned, group = pattern
    check_group(shape[1], pruned, group)
    given = shape.numel() // group * pruned
    if zeros != given:
        raise ValueError(f"{zeros} zeros asked of a layer to which the pattern {pruned}:{group} gives {given}")


def keep_highest_of_groups(score_OI: Tensor, dead_OI: Tensor, pruned: int, group: int) -> Tensor:
    """Mask (bool, True = stays) with the `pruned` lowest scores of every `group` consecutive inputs removed.

    Weights marked `dead_OI` (exact zeros) go first; ties go by column, as a stable sort would. Every group loses
    exactly `pruned`, so a group with more exact zeros than that keeps some of them. Raises ValueError when d_in is
    not divisible by `group`, or a score is negative or not finite.
    """
    rows, columns = score_OI.shape
    check_group(columns, pruned, group)
    ranks_CM = order_preserving_ints(score_OI, dead_OI).reshape(-1, group)
    keep_MC = keep_highest_of_columns(ranks_CM.T, pruned)
    return keep_MC.T.reshape(rows, columns)


def keep_highest_of_columns(ranks_MC: Tensor, pruned: int) -> Tensor:
    """Mask (bool, True = stays) with the `pruned` lowest of each *column* removed, ties by row."""
    if choose_kernel(ranks_MC.device) == "triton":
        from billhook_kernels import triton_masks

        return triton_masks.remove_lowest_of_columns(ranks_MC, pruned)
    ranks_MC = ranks_MC.contiguous()
    members, groups = ranks_MC.shape
    if members > 32 or groups < 300 * members:  # too many pairs, or too little work for as many calls
        order_MC = torch.sort(ranks_MC, dim=0, stable=True).indices
        keep_MC = torch.ones_like(ranks_MC, dtype=torch.bool)
        return keep_MC.scatter_(0, order_MC[:pruned], False)
    # A member's place in its group is the number of members before it. A group lies across the rows, so that each
    # comparison is one pass over two whole rows.
    place_MC = torch.zeros(ranks_MC.shape, dtype=torch.uint8, device=ranks_MC.device)
    for i in range(members):
        for j in range(i + 1, members):
            first_goes = ranks_MC[i] <= ranks_MC[j]
            place_MC[j] += first_goes
            place_MC[i] += ~first_goes
    return place_MC >= pruned
