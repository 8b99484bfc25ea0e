"""No update may cost more than it repairs. Shape suffixes: O output features (rows), I input features (columns)."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def find_low(begin: int, count: int, measure: Callable[[int], float]) -> int:
    """The place, of `count`, to which numbers fall from `begin` on, up or else down; each is measured once, and none
    beyond the first that is no lower."""
    known = {begin: measure(begin)}

    def look(place: int) -> float:
        if place not in known:
            known[place] = measure(place)
        return known[place]

    place = begin
    for towards in (1, -1):
        while 0 <= place + towards < count and look(place + towards) < known[place]:
            place += towards
    return place


DAMPING = 0.01
"""Share of mean(diag A) added to A's diagonal, as in SparseGPT (arXiv 2301.00774)."""

ESCALATIONS = 4
"""How often a failed factorisation is tried again with ten times the damping."""


def escalate(damping: float) -> Iterator[float]:
    """The damping to begin with, then ten times as much as before, ESCALATIONS times."""
    for _ in range(ESCALATIONS + 1):
        yield damping
        damping *= 10


def damp_inputs(second_moment_II: Tensor, share: float) -> Tensor:
    """(A + share * diag A) / (1 + share), fp32, (I, I): A with less of what its inputs have in common.

    A fit to it is a ridge regression (Hoerl and Kennard 1970, eq. 2.1) in the coordinates in which all inputs are as
    loud, where that to A + d I would spare the loud ones.
    """
    return damp_part(second_moment_II, slice(None), slice(None), share)


def damp_part(second_moment_II: Tensor, rows: slice, columns: slice, share: float) -> Tensor:
    """Some rows of some columns, the same ones or none of them, of `damp_inputs(A, share)`, whole as large as A is."""
    moment_II = second_moment_II[rows, columns]
    if not share:
        return moment_II.float()
    damped_II = moment_II.float() / (1 + share)
    if rows == columns:
        damped_II.diagonal().copy_(moment_II.diagonal())
    return damped_II


BANDS = 8
"""In so many parts, about, a matrix is looked at."""


class Pruned(NamedTuple):
    """A pruned layer."""

    weight_OI: Tensor
    """In the dtype of the dense weight, zero where `keep_OI` is False."""
    keep_OI: Tensor
    """bool, True = stays."""
    damping: float = DAMPING
    """Share of mean(diag A) that an update added to A's diagonal: more than DAMPING where that did not suffice."""


def is_finite(matrix_NN: Tensor) -> bool:
    """Whether no entry is infinite or not a number; looked at in bands, for torch makes a copy of what it looks at."""
    return all(bool(torch.isfinite(band).all()) for band in matrix_NN.split(max(1, len(matrix_NN) // BANDS)))


def row_errors(change_OI: Tensor, second_moment_II: Tensor, damping: float = 0.0) -> Tensor:
    """Mean over tokens of ((W - W')x)^2 of each output, from change = W - W' and A: shape (O,), fp32, at least 0.

    A is symmetric, so what lies below its diagonal need not be multiplied: little more than half a product. With
    `damping` it is `damp_inputs(A, damping)`, a part of which is made at a time.
    """
    change_OI = change_OI.float()
    columns = change_OI.shape[1]
    error_O = torch.zeros(len(change_OI), device=change_OI.device)
    width = max(64, -(-columns // 8))
    for start in range(0, columns, width):
        own, before = slice(start, start + width), slice(start)
        part_OI = change_OI[:, own]
        product_OI = part_OI @ damp_part(second_moment_II, own, own, damping)
        product_OI.addmm_(change_OI[:, before], damp_part(second_moment_II, before, own, damping), alpha=2)
        error_O += product_OI.mul_(part_OI).sum(1)
    return error_O.clamp_(min=0)


def keep_better_rows(
    updated_OI: Tensor,
    weight_OI: Tensor,
    keep_OI: Tensor,
    second_moment_II: Tensor,
    bound_O: Tensor | None = None,
    *,
    damping: float = 0.0,
) -> Tensor:
    """`updated_OI`, but rows whose error the mask alone leaves smaller become the masked dense row.

    The error is that of `row_errors`, the mean over tokens of ((W - W')x)^2, of the updated weight in the dtype it is
    given in: without what the update itself added to the diagonal. An update can lose against its mask for three
    reasons: SparseGPT fixes a survivor before it knows which later columns go; damping weighs the inputs differently
    from the text; and rounding the survivors to bf16 may cost more than removing the few least weights did. `bound_O`
    is an upper bound on each row's error, if one is known: rows where it is below the mask's error need no second
    product. `damping` is as in `row_errors`.
    """
    masked_O = row_errors(weight_OI.float() * ~keep_OI, second_moment_II, damping)  # masked_fill is slower
    rows = torch.arange(len(masked_O), device=masked_O.device)
    if bound_O is not None:
        rows = (bound_O > masked_O).nonzero()[:, 0]
    error_O = row_errors(weight_OI[rows].float() - updated_OI[rows], second_moment_II, damping)
    worse = rows[error_O > masked_O[rows]]
    if len(worse) == 0:
        return updated_OI
    better_OI = updated_OI.clone()
    better_OI[worse] = torch.where(keep_OI[worse], weight_OI[worse], 0).to(updated_OI.dtype)
    return better_OI


def finish_update(
    fitted_OI: Tensor,
    weight_OI: Tensor,
    keep_OI: Tensor,
    second_moment_II: Tensor,
    *,
    bound_O: Tensor | None = None,
    damping: float = 0.0,
) -> Tensor:
    """Updated weights (fp32, zero where `keep_OI` is False) as they are stored: in the dtype of the dense weight.

    A survivor that the update or the rounding brings to exactly 0 would be one zero too many, so it becomes the least
    normal number; one that was 0 in the dense weight may stay so. Then `keep_better_rows`, `bound_O` being a bound on
    the errors before the rounding, and `damping` as in `row_errors`. Raises ValueError when a weight is not finite.
    """
    updated_OI = fitted_OI.to(weight_OI.dtype)
    if not bool(torch.isfinite(updated_OI.sum(dtype=torch.float32))):
        raise ValueError("the updated weights are not finite")
    lost_OI = (updated_OI == 0).logical_and_(keep_OI)
    if bool(lost_OI.any()):
        updated_OI = mend_lost(updated_OI, lost_OI & (weight_OI != 0))
    if bound_O is not None and updated_OI.dtype != torch.float32:
        bound_O = bound_rounding(fitted_OI, updated_OI, bound_O, second_moment_II.diagonal())
    return keep_better_rows(updated_OI, weight_OI, keep_OI, second_moment_II, bound_O, damping=damping)


def mend_lost(stored: Tensor, lost: Tensor) -> Tensor:
    """Weights as they are stored, with the least normal number for survivors that came out as exactly 0."""
    return stored.masked_fill(lost, torch.finfo(stored.dtype).tiny)


def bound_rounding(exact_OI: Tensor, rounded_OI: Tensor, error_O: Tensor, mean_square_I: Tensor) -> Tensor:
    """Upper bound on the error of each row after rounding, from its error before: shape (O,).

    sqrt(e^T A e) is a norm, and that of the rounding alone is at most sum_j |r_j| sqrt(a_j).
    """
    rounding_O = (exact_OI - rounded_OI.float()).abs_() @ mean_square_I.float().clamp(min=0).sqrt()
    return (error_O.clamp(min=0).sqrt() + rounding_O).square()
