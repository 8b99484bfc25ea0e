"""How much is added to the diagonal of a second moment before it is factored or divided by."""

from collections.abc import Iterator

DAMPING = 0.01
"""Share of mean(diag A) added to A's diagonal, as in SparseGPT (arXiv 2301.00774)."""

ESCALATIONS = 4
"""How often a failed factorisation is tried again with ten times the damping."""


def escalate(damping: float) -> Iterator[float]:
    """The damping to begin with, then ten times as much as before, ESCALATIONS times."""
    for _ in range(ESCALATIONS + 1):
        yield damping
        damping *= 10
