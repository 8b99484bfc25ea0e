"""ALPS (arXiv 2406.07831): mask and weights together, by the alternating direction method of multipliers (ADMM).

It minimises (w - w0)^T H (w - w0) over the rows of a layer, with a given number of zeros in all, in coordinates in
which H has the diagonal 1. The constraint is split off: B minimises the error near D, D has the zeros, and V, the
multipliers, pulls the two together:

    B = (W0 H - V + rho D) (H + rho I)^-1,    D = the largest of B + V / rho,    V = V + rho (B - D).

Which weights are zero is chosen again in every turn, so that zeros may come back: that sets it apart from methods
whose mask only grows. Exact zeros of the dense weight alone stay what they are.

Shape suffixes: O output features (rows), I input features (columns).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.dispatch import one_thread
from billhook_kernels.guard import DAMPING, Pruned, finish_update
from billhook_kernels.masks import Pattern, keep_highest, keep_highest_of_groups
from billhook_kernels.preconditioner import System
from billhook_kernels.refit_steps import refit_survivors

RHO = 0.1
"""ALPS's first penalty."""
LEAST_RHO, MOST_RHO = 1e-6, 1e6
"""Its bounds; the authors know the upper one only, but fp32 needs both."""
TURNS, FIRST_TURNS, CHECKED = 300, 30, 3
"""ALPS's most turns, those after which a mask that hardly changes will do, and those between two looks at the mask."""
GROWTH = ((0.1, 1.3), (0.005, 1.2))
"""The penalty grows by the second where more than the first of the survivors changed places, else by LEAST_GROWTH."""
LEAST_GROWTH, SHRINKAGE = 1.1, 5.0
"""A first penalty under which the mask hardly moves is divided by SHRINKAGE, and the solver begins again."""
STABLE = 0.0003
"""Share of the survivors that may still change places in the last turn."""
FIT_ITERATIONS = 10
"""Of conjugate gradients on ALPS's final mask."""


class Spectrum(NamedTuple):
    """C = S^-1 (A + d I) S^-1 with the diagonal 1, and its eigenvectors."""

    matrix_II: Tensor
    """C, fp32."""
    scale_I: Tensor
    """S, up to a factor, fp32."""
    values_I: Tensor
    """fp64, at least 0."""
    vectors_II: Tensor
    """One in each column, fp32."""

    def invert(self, rho: float) -> Tensor:
        """(C + rho I)^-1."""
        return (self.vectors_II * (self.values_I + rho).reciprocal().float()) @ self.vectors_II.T


def prepare_spectrum(second_moment_II: Tensor) -> Spectrum | None:
    """The coordinates of `solve_alps`, d = DAMPING * mean(diag A); None when A is all zero.

    Layers that read the same inputs can share it. Raises ValueError when A is not finite.
    """
    moment_II, mean = _check_moment(second_moment_II)
    if mean <= 0:
        return None
    scale_I = (moment_II.diagonal() / mean + DAMPING).sqrt()
    matrix_II = (moment_II / mean).div_(scale_I[:, None]).div_(scale_I)
    matrix_II.diagonal().fill_(1.0)
    with one_thread(matrix_II.device):  # LAPACK's answers differ from one number of threads to another
        values_I, vectors_II = torch.linalg.eigh(matrix_II.double())
    return Spectrum(matrix_II, scale_I, values_I.clamp(min=0), vectors_II.float())


def solve_alps(
    weight_OI: Tensor,
    second_moment_II: Tensor,
    zeros: int,
    *,
    pattern: Pattern | None = None,
    spectrum: Spectrum | None = None,
) -> Pruned:
    """ALPS (arXiv 2406.07831): ADMM whose penalty grows as the mask settles, then least squares on that mask.

    The penalty starts at RHO and grows after every CHECKED turns, by how many survivors changed places (algorithm 1
    with the scheme of its appendix and the published defaults), until the mask stands still. The survivors are then
    refitted by FIT_ITERATIONS of conjugate gradients with a diagonal preconditioner (algorithm 2). The zeros are the
    lowest of the whole layer, in the scaled coordinates, or with `pattern` = (N, M) the N lowest of each M consecutive
    inputs; exact zeros of the dense weight go first. `spectrum` is `prepare_spectrum(second_moment_II)`, if at hand.

    Rows which end worse than the mask alone are the masked dense rows (`keep_better_rows`). `zeros` must be possible:
    at least the layer's exact zeros, or what the pattern gives. Raises ValueError when the statistics are not finite.
    """
    spectrum = spectrum or prepare_spectrum(second_moment_II)
    keep_of = _make_projection(weight_OI, pattern)
    if spectrum is None:  # the layer never saw a non-zero input: nothing to fit to
        return _mask_alone(weight_OI, keep_of(weight_OI.float(), zeros))
    matrix_II, scale_I = spectrum.matrix_II, spectrum.scale_I
    dense_OI = weight_OI.float() * scale_I
    near_OI = _alternate(dense_OI, spectrum, lambda values_OI: keep_of(values_OI, zeros))
    keep_OI = keep_of(near_OI, zeros)
    fitted_OI = refit_survivors(
        weight_OI,
        keep_OI,
        second_moment_II,
        start_OI=near_OI.div_(scale_I),
        system=System(matrix_II, scale_I, matrix_II.new_zeros(len(matrix_II), 1)),
        iterations=FIT_ITERATIONS,
        tolerance=0.0,
    )
    return Pruned(finish_update(fitted_OI, weight_OI, keep_OI, second_moment_II), keep_OI)


def _alternate(dense_OI: Tensor, spectrum: Spectrum, keep_of: Callable[[Tensor], Tensor]) -> Tensor:
    """ALPS's B after its last turn."""
    target_OI = dense_OI @ spectrum.matrix_II
    first_OI = keep_of(dense_OI)
    seen_OI, rho, moves = first_OI, RHO, False
    inverse_II = spectrum.invert(rho)
    near_OI, sparse_OI, pull_OI = dense_OI, dense_OI * first_OI, torch.zeros_like(dense_OI)
    survivors = max(int(torch.count_nonzero(first_OI)), 1)
    for turn in range(TURNS):
        near_OI = torch.add(target_OI, sparse_OI, alpha=rho).sub_(pull_OI) @ inverse_II
        moved_OI = torch.add(near_OI, pull_OI, alpha=1 / rho)
        keep_OI = keep_of(moved_OI)
        sparse_OI = moved_OI * keep_OI
        pull_OI = moved_OI.sub_(sparse_OI).mul_(rho)
        if (turn + 1) % CHECKED:
            continue
        changed = int(torch.count_nonzero(keep_OI != seen_OI))
        seen_OI, moves = keep_OI, moves or changed > GROWTH[-1][0] * survivors
        if (moves and changed == 0) or (turn >= FIRST_TURNS and changed < STABLE * survivors):
            break
        if moves:
            growth = next((factor for share, factor in GROWTH if changed > share * survivors), LEAST_GROWTH)
            rho = min(rho * growth, MOST_RHO)
        else:
            rho = max(rho / SHRINKAGE, LEAST_RHO)
            if changed:
                sparse_OI, pull_OI = dense_OI * first_OI, torch.zeros_like(dense_OI)
        inverse_II = spectrum.invert(rho)
    return near_OI


def _check_moment(second_moment_II: Tensor) -> tuple[Tensor, float]:
    """(A in fp32, the mean of its diagonal)."""
    moment_II = second_moment_II.float()
    if not bool(torch.isfinite(moment_II).all()):
        raise ValueError("the second moment is not finite")
    return moment_II, float(moment_II.diagonal().mean())


def _make_projection(weight_OI: Tensor, pattern: Pattern | None) -> Callable[[Tensor, int], Tensor]:
    """(values (O, I), zeros) to the mask (bool, True = stays) of the largest ones, exact zeros of the weight first."""
    dead_OI = weight_OI == 0
    weights, present = dead_OI.numel(), int(torch.count_nonzero(dead_OI))

    def keep_of_layer(values_OI: Tensor, zeros: int) -> Tensor:
        return keep_highest(values_OI.abs(), dead_OI, max(zeros, present))

    def keep_of_groups(values_OI: Tensor, zeros: int) -> Tensor:
        assert pattern is not None
        score_OI = values_OI.abs()
        stays_OI = keep_highest_of_groups(score_OI, dead_OI, *pattern)
        if zeros == weights // pattern[1] * pattern[0]:
            return stays_OI
        # Only what is among the N lowest of its group may go, so that no group can end with more.
        first_OI = dead_OI & ~stays_OI
        score_OI.masked_fill_(stays_OI, torch.finfo(torch.float32).max)
        return keep_highest(score_OI, first_OI, max(zeros, int(torch.count_nonzero(first_OI))))

    return keep_of_layer if pattern is None else keep_of_groups


def _mask_alone(weight_OI: Tensor, keep_OI: Tensor) -> Pruned:
    return Pruned(torch.where(keep_OI, weight_OI, 0), keep_OI)
