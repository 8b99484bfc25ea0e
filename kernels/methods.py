"""The pruning methods by name: from a layer's weights and statistics to its pruned weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.masks import keep_highest, keep_highest_of_rows
from kernels.refit import refit_survivors
from kernels.scores import score_two_sided, score_wanda


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration text says of one layer (O output, I input features), all fp32."""

    mean_square_I: Tensor
    """a: mean square of each input feature."""
    gradient_square_O: Tensor
    """gamma: mean square of the loss gradient at each output feature."""
    second_moment_II: Tensor | None = None
    """A = mean of x x^T; only a refit needs it."""


def mask_wanda(weight_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Tensor:
    """Wanda (arXiv 2306.11695): lowest |W| sqrt(a) of each output row."""
    return keep_highest_of_rows(score_wanda(weight_OI, statistics.mean_square_I), weight_OI == 0, zeros)


def mask_two_sided(weight_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Tensor:
    """Lowest W^2 a gamma of the whole layer."""
    score_OI = score_two_sided(weight_OI, statistics.mean_square_I, statistics.gradient_square_O)
    return keep_highest(score_OI, weight_OI == 0, zeros)


MASKS: dict[str, Callable[[Tensor, LayerStatistics, int], Tensor]] = {
    "wanda": mask_wanda,
    "two-sided": mask_two_sided,
}


def prune_weight(method: str, weight_OI: Tensor, statistics: LayerStatistics, zeros: int, *, refit: bool) -> Tensor:
    """The pruned weight, in the dtype of `weight_OI`, with `zeros` zeros chosen by `method`.

    With `refit` the survivors become the damped least-squares fit to the dense layer's output. Raises ValueError
    when the statistics are not finite or a refit lacks the second moment.
    """
    keep_OI = MASKS[method](weight_OI, statistics, zeros)
    if not refit:
        return torch.where(keep_OI, weight_OI, 0)
    if statistics.second_moment_II is None:
        raise ValueError("a refit needs the second moment of the layer's inputs")
    fitted_OI = refit_survivors(weight_OI, keep_OI, statistics.second_moment_II).to(weight_OI.dtype)
    if not bool(torch.isfinite(fitted_OI).all()):
        raise ValueError("the refit is not finite")
    # A survivor that the refit (or fp16) brings to exactly 0 would be one zero too many.
    fitted_OI = torch.where(fitted_OI == 0, torch.finfo(fitted_OI.dtype).tiny, fitted_OI)
    return torch.where(keep_OI, fitted_OI, 0)  # and no -0.0, which a packed weight does not keep
