"""Masks on a GPU: exact counts by radix select, ties by column, bit for bit as `billhook_kernels.masks` has them.

Ranks are int32 and at least 0, as `ranks.order_preserving_ints` gives them. A row that fits into the registers
of one program is selected there, a bit at a time; a longer one (a whole layer) by many programs that count digits.

Shape suffixes: R rows, N columns, K chunks of a row, O output features (rows), I input features (columns), M position
in a group, C group and row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from billhook_kernels.dispatch import INFINITY, NO_SCORE

WIDEST_ROW = 16384
"""Columns of a row that one program selects from."""

CHUNK = 4096
"""Columns of a longer row that one program looks at."""

LARGEST_GROUP = 32
"""Inputs of an N:M group whose pairs are all compared; a larger one is a row."""

LAUNCH = {"enable_fp_fusion": False}
"""Triton warns where it is not told; there is nothing to fuse in comparing numbers."""

_PAIRS = 8192
"""Comparisons of one program."""

_LAST = tl.constexpr(0x7FFFFFFF)
"""Rank of what lies behind the last column: above every other."""

_INFINITY = tl.constexpr(INFINITY)


def select_kth(ranks_RN: Tensor, k: int) -> Tensor:
    """The k-th smallest (k from 1) of each row: shape (R,)."""
    ranks_RN = ranks_RN.contiguous()
    counts_R = torch.full((len(ranks_RN),), k, dtype=torch.int32, device=ranks_RN.device)
    if ranks_RN.shape[1] > WIDEST_ROW:
        return _find_thresholds(ranks_RN, counts_R)[0]
    return _select_rows(ranks_RN, None, counts_R, keep=False)[0]


def remove_lowest(ranks_RN: Tensor, counts_R: Tensor) -> Tensor:
    """Mask (bool, True = stays) with the `counts_R[r]` lowest of each row r removed, ties by column."""
    ranks_RN, counts_R = ranks_RN.contiguous(), counts_R.to(ranks_RN.device, torch.int32)
    if ranks_RN.shape[1] > WIDEST_ROW:
        return _keep_chunks(ranks_RN, *_find_thresholds(ranks_RN, counts_R))
    return _select_rows(ranks_RN, None, counts_R, keep=True)[1]


def remove_lowest_of_columns(ranks_MC: Tensor, pruned: int) -> Tensor:
    """Mask (bool, True = stays) with the `pruned` lowest of each *column* removed, ties by row."""
    members, groups = ranks_MC.shape
    if members > LARGEST_GROUP:
        counts_C = torch.full((groups,), pruned, dtype=torch.int32, device=ranks_MC.device)
        return remove_lowest(ranks_MC.T, counts_C).T
    keep_MC = torch.empty_like(ranks_MC, dtype=torch.uint8)
    width = triton.next_power_of_2(members)
    height = _PAIRS // width**2
    strides = *ranks_MC.stride(), *keep_MC.stride()
    with torch.cuda.device_of(ranks_MC):
        _rank_groups[(triton.cdiv(groups, height),)](
            ranks_MC, keep_MC, groups, members, pruned, *strides, MEMBERS=width, GROUPS=height, **LAUNCH
        )
    return keep_MC.view(torch.bool)


def select_wanda(weight_OI: Tensor, norm_I: Tensor, counts_O: Tensor) -> tuple[Tensor, Tensor]:
    """The `counts_O[o]`-th lowest rank of each row, and the mask (bool, True = stays) with as many lowest removed.

    The ranks are those of the scores |W| times `norm_I` (fp32, not -0.0), exact zeros below all others; no score is
    written out. Rows have at most WIDEST_ROW columns. Raises ValueError when a score is not finite.
    """
    counts_O = counts_O.to(weight_OI.device, torch.int32)
    threshold_O, keep_OI, wrong_O = _select_rows(weight_OI.contiguous(), norm_I.contiguous(), counts_O, keep=True)
    if bool(wrong_O.any()):
        raise ValueError(NO_SCORE)
    return threshold_O, keep_OI


# --- calls -------------------------------------------------------------------------------------------------------


def _select_rows(
    source_RN: Tensor, norm_N: Tensor | None, counts_R: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, mask and which rows hold no scores, from ranks, or from weights where `norm_N` is given."""
    rows, columns = source_RN.shape
    threshold_R, wrong_R = torch.empty_like(counts_R), torch.empty_like(counts_R)
    keep_RN = torch.empty(source_RN.shape if keep else (0,), dtype=torch.uint8, device=source_RN.device)
    width = max(16, triton.next_power_of_2(columns))
    with torch.cuda.device_of(source_RN):
        _select_row[(rows,)](
            source_RN,
            source_RN if norm_N is None else norm_N,
            counts_R,
            threshold_R,
            keep_RN,
            wrong_R,
            columns,
            WANDA=norm_N is not None,
            KEEP=keep,
            WIDTH=width,
            num_warps=min(16, max(1, width // 512)),
            **LAUNCH,
        )
    return threshold_R, keep_RN.view(torch.bool), wrong_R


def _find_thresholds(ranks_RN: Tensor, counts_R: Tensor) -> tuple[Tensor, Tensor]:
    """The `counts_R[r]`-th smallest of each row, and how many of those that equal it are among the smallest."""
    (rows, columns), device = ranks_RN.shape, ranks_RN.device
    chunks = triton.cdiv(columns, CHUNK)
    threshold_R, left_R = torch.zeros_like(counts_R), counts_R.long()
    for shift in (24, 16, 8, 0):
        histogram_RD = torch.zeros(rows, 256, dtype=torch.int32, device=device)
        fixed = 0x7FFFFFFF & ~((1 << (shift + 8)) - 1)
        with torch.cuda.device_of(ranks_RN):
            _count_digits[(rows * chunks,)](
                ranks_RN, threshold_R, histogram_RD, columns, chunks, FIXED=fixed, SHIFT=shift, CHUNK=CHUNK, **LAUNCH
            )
        up_to_RD = histogram_RD.cumsum(1)
        below_RD = up_to_RD < left_R[:, None]
        digit_R = below_RD.sum(1)
        left_R = left_R - (histogram_RD * below_RD).sum(1)
        threshold_R = threshold_R | (digit_R << shift).int()
    return threshold_R, left_R


def _keep_chunks(ranks_RN: Tensor, threshold_R: Tensor, tied_R: Tensor) -> Tensor:
    """The mask from the thresholds and from how many of what equals them goes."""
    rows, columns = ranks_RN.shape
    chunks = triton.cdiv(columns, CHUNK)
    ties_RK = torch.empty(rows, chunks, dtype=torch.int32, device=ranks_RN.device)
    keep_RN = torch.empty(ranks_RN.shape, dtype=torch.uint8, device=ranks_RN.device)
    with torch.cuda.device_of(ranks_RN):
        _count_ties[(rows * chunks,)](ranks_RN, threshold_R, ties_RK, columns, chunks, CHUNK=CHUNK, **LAUNCH)
        left_RK = tied_R[:, None] - (ties_RK.cumsum(1) - ties_RK)
        _keep_chunk[(rows * chunks,)](ranks_RN, threshold_R, left_RK, keep_RN, columns, chunks, CHUNK=CHUNK, **LAUNCH)
    return keep_RN.view(torch.bool)


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _select_row(
    source,
    norm,
    counts,
    thresholds,
    keep,
    wrong,
    columns,
    WANDA: tl.constexpr,
    KEEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: the highest threshold that has fewer than `count` ranks below it, found from the highest bit down."""
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    at = row.to(tl.int64) * columns + column
    if WANDA:
        weight = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        score = tl.abs(weight) * tl.load(norm + column, mask=inside, other=0.0)
        bits = score.to(tl.int32, bitcast=True)
        refused = (bits < 0) | (bits >= _INFINITY)
        tl.store(wrong + row, tl.max(refused.to(tl.int32), 0))
        rank = tl.where(weight == 0.0, 0, bits + 1)
        rank = tl.where(inside, rank, _LAST)
    else:
        rank = tl.load(source + at, mask=inside, other=_LAST)
    count = tl.load(counts + row)
    threshold = tl.zeros((), tl.int32)
    for i in range(31):
        candidate = threshold | (1 << (30 - i))
        below = tl.sum((rank < candidate).to(tl.int32), 0)
        threshold = tl.where(below < count, candidate, threshold)
    tl.store(thresholds + row, threshold)
    if KEEP:
        tied = (rank == threshold).to(tl.int32)
        left = count - tl.sum((rank < threshold).to(tl.int32), 0)
        stays = (rank > threshold) | ((tied == 1) & (tl.cumsum(tied, 0) > left))
        tl.store(keep + at, stays.to(tl.uint8), mask=inside)


@triton.jit
def _load_chunk(ranks, columns, chunks, CHUNK: tl.constexpr):
    """(row, place in memory, what is inside, ranks) of a program's chunk."""
    program = tl.program_id(0)
    row = program // chunks
    column = (program % chunks) * CHUNK + tl.arange(0, CHUNK)
    inside = column < columns
    at = row.to(tl.int64) * columns + column
    return row, at, inside, tl.load(ranks + at, mask=inside, other=_LAST)


@triton.jit
def _count_digits(
    ranks, prefixes, histogram, columns, chunks, FIXED: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr
):
    """How often each digit of 8 bits follows on the row's prefix: those bits that are set in FIXED."""
    row, _, inside, rank = _load_chunk(ranks, columns, chunks, CHUNK)
    follows = inside & (((rank ^ tl.load(prefixes + row)) & FIXED) == 0)
    digit = tl.where(follows, (rank >> SHIFT) & 255, 0)
    others = CHUNK - tl.sum(follows.to(tl.int32), 0)
    place = tl.arange(0, 256)
    count = tl.histogram(digit, 256) - tl.where(place == 0, others, 0)
    tl.atomic_add(histogram + row * 256 + place, count, mask=count > 0)


@triton.jit
def _count_ties(ranks, thresholds, ties, columns, chunks, CHUNK: tl.constexpr):
    row, _, inside, rank = _load_chunk(ranks, columns, chunks, CHUNK)
    tied = inside & (rank == tl.load(thresholds + row))
    tl.store(ties + tl.program_id(0), tl.sum(tied.to(tl.int32), 0))


@triton.jit
def _keep_chunk(ranks, thresholds, lefts, keep, columns, chunks, CHUNK: tl.constexpr):
    """`lefts`: how many ties still go when the chunk begins, int64, below 0 where that is none for long."""
    row, at, inside, rank = _load_chunk(ranks, columns, chunks, CHUNK)
    threshold, left = tl.load(thresholds + row), tl.load(lefts + tl.program_id(0))
    tied = (inside & (rank == threshold)).to(tl.int32)
    stays = (rank > threshold) | ((tied == 1) & (tl.cumsum(tied, 0) > left))
    tl.store(keep + at, stays.to(tl.uint8), mask=inside)


@triton.jit
def _rank_groups(
    ranks,
    keep,
    groups,
    members,
    pruned,
    member_stride,
    group_stride,
    keep_member_stride,
    keep_group_stride,
    MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A member's place in its group is the number of members before it."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    member = tl.arange(0, MEMBERS)
    wide = member.to(tl.int64)
    inside = (group < groups)[:, None] & (member < members)[None, :]
    at = group[:, None] * group_stride + wide[None, :] * member_stride
    rank = tl.load(ranks + at, mask=inside, other=_LAST)
    one, other = rank[:, :, None], rank[:, None, :]
    earlier = member[None, None, :] < member[None, :, None]
    before = (other < one) | ((other == one) & earlier)
    place = tl.sum(before.to(tl.int32), 2)
    to = group[:, None] * keep_group_stride + wide[None, :] * keep_member_stride
    tl.store(keep + to, (place >= pruned).to(tl.uint8), mask=inside)
