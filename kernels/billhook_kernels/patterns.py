"""N:M patterns: of every M consecutive inputs of a row, the N lowest are zeroed.

So N counts the zeros, as in Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774), not the survivors; for 2:4
and 4:8 the two are the same.

Shape suffixes: O output features (rows), I input features (columns), M position in a group, C group and row.
"""

import torch
from torch import Tensor

from billhook_kernels.dispatch import choose_kernel
from billhook_kernels.masks import order_preserving_ints

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
