"""Billhook's own method: the mask grows in steps, all survivors refitted between them.

Shape suffixes: O output features (rows), I input features (columns).
"""

import torch
from torch import Tensor

from kernels.guard import Pruned, keep_better_rows
from kernels.masks import keep_highest
from kernels.patterns import check_group, keep_highest_of_groups
from kernels.refit import refit_survivors
from kernels.scores import score_two_sided


def refit_in_steps(
    weight_OI: Tensor,
    second_moment_II: Tensor,
    gradient_square_O: Tensor,
    zeros: int,
    *,
    pattern: tuple[int, int] | None = None,
    steps: int = 5,
    iterations: int = 8,
    last_iterations: int = 16,
    tolerance: float = 1e-3,
) -> Pruned:
    """Zero the weights of lowest W_ij^2 * a_j * gamma_i in `steps` steps, and refit the others after each.

    A = `second_moment_II`, a its diagonal, gamma = `gradient_square_O`; W is the weight as refitted so far, so that a
    later step sees what the survivors have taken over from those that went. Scores are compared over the layer; with
    `pattern` = (N, M) inside every M consecutive inputs first. No step takes back a zero; the last lands on exactly
    `zeros`. Each refit is `refit_survivors` against the *dense* weight, from where the last step ended.

    Exact zeros of the dense weight go first (with a pattern, up to N of a group; the refit may fill the rest). Rows
    which end worse than the mask alone are the masked dense rows (`keep_better_rows`).

    Raises ValueError when the layer has more exact zeros than `zeros`, fewer weights, when `zeros` is not what the
    pattern gives, or when the statistics are not finite.
    """
    exact_OI = weight_OI == 0
    keep_OI = ~(exact_OI if pattern is None else _limit_to_groups(exact_OI, zeros, *pattern))
    present = int((~keep_OI).sum())
    if not present <= zeros <= exact_OI.numel():
        raise ValueError(f"{zeros} zeros asked of a layer of {exact_OI.numel()} weights that has {present} already")
    fitted_OI = weight_OI.float()
    for count in plan_steps(zeros, steps, present):
        score_OI = score_two_sided(fitted_OI, second_moment_II.diagonal(), gradient_square_O)
        keep_OI = _grow_mask(keep_OI, score_OI, count, pattern)
        fitted_OI = refit_survivors(
            weight_OI,
            keep_OI,
            second_moment_II,
            start_OI=fitted_OI,
            iterations=last_iterations if count == zeros else iterations,
            tolerance=tolerance,
        )
    if not bool(torch.isfinite(fitted_OI).all()):
        raise ValueError("the refit is not finite")
    fitted_OI = fitted_OI.to(weight_OI.dtype)
    return Pruned(keep_better_rows(fitted_OI, weight_OI, keep_OI, second_moment_II), keep_OI)


def plan_steps(zeros: int, steps: int, present: int) -> list[int]:
    """Zeros after each step: zeros * (1 - (1 - k/steps)^3), at least the `present` ones, the last exactly `zeros`.

    Large steps first, while there is much to choose from; steps that would add nothing are left out.
    """
    if steps < 1:
        raise ValueError(f"a mask cannot grow in {steps} steps")
    counts = [max(present, round(zeros * (1 - (1 - k / steps) ** 3))) for k in range(1, steps)]
    return [*sorted({count for count in counts if present < count < zeros}), zeros]


def _limit_to_groups(exact_OI: Tensor, zeros: int, pruned: int, group: int) -> Tensor:
    """Of the exact zeros as many as a group may lose. Raises ValueError when `zeros` is not what the pattern gives."""
    check_group(exact_OI.shape[1], pruned, group)
    wanted = exact_OI.numel() // group * pruned
    if zeros != wanted:
        raise ValueError(f"{zeros} zeros asked of a layer to which the pattern {pruned}:{group} gives {wanted}")
    return exact_OI & ~keep_highest_of_groups(torch.ones_like(exact_OI, dtype=torch.float32), exact_OI, pruned, group)


def _grow_mask(keep_OI: Tensor, score_OI: Tensor, count: int, pattern: tuple[int, int] | None) -> Tensor:
    """The mask with `count` zeros, those of `keep_OI` among them."""
    if pattern is not None:
        # Only what is among the N lowest of its group may go, so that no group can end with more.
        stays_OI = keep_highest_of_groups(score_OI, ~keep_OI, *pattern)
        score_OI = score_OI.masked_fill(stays_OI, torch.finfo(torch.float32).max)
    return keep_highest(score_OI, ~keep_OI, count)
