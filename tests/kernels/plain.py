"""What masks and refits are held against: a stable sort in plain Python, and least squares row by row in float64."""

import hypothesis.strategies as st
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from billhook_kernels.guard import DAMPING

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

FEW_VALUES = st.sampled_from([0.0, -0.0, 1e-45, 0.5, 0.5, 1.0, 2.0, 3e38])
"""Scores, of which ties are the rule."""


def plain_order(score: list[float], dead: list[bool]) -> list[int]:
    """Positions in the order they are removed: exact zeros, then ascending score, ties by position."""
    return sorted(range(len(score)), key=lambda i: (not dead[i], 0.0 if dead[i] else score[i], i))


def plain_mask(score: list[float], dead: list[bool], zeros: int) -> list[bool]:
    """True where a weight stays when the first `zeros` go."""
    removed = set(plain_order(score, dead)[:zeros])
    return [i not in removed for i in range(len(score))]


def plain_groups(score: list[float], dead: list[bool], pruned: int, group: int) -> list[bool]:
    """One row: in every group the lowest go, exact zeros first, ties by column."""
    starts = range(0, len(score), group)
    return [stays for i in starts for stays in plain_mask(score[i : i + group], dead[i : i + group], pruned)]


def damped(second_moment: Tensor) -> Array:
    """H = A + DAMPING * mean(diag A) * I."""
    moment = second_moment.double().numpy()
    return np.asarray(moment + DAMPING * np.diag(moment).mean() * np.eye(len(moment)))


def solve_rows(dense: Tensor, keep: Flags, second_moment: Tensor) -> Array:
    """argmin over the survivors of (w - w0)^T H (w - w0): H_ss w_s = (H w0)_s."""
    h, fitted = damped(second_moment), np.zeros(dense.shape)
    for i, (row, kept) in enumerate(zip(dense.double().numpy(), keep, strict=True)):
        if kept.any():
            fitted[i, kept] = np.linalg.solve(h[np.ix_(kept, kept)], (h @ row)[kept])
    return fitted
