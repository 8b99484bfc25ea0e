"""How much is added to the diagonal of a second moment before it is factored or divided by."""

from collections.abc import Iterator

from torch import Tensor

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
