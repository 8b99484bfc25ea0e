"""The pruning methods by name: from a layer's weights and statistics to its pruned weights.

Shape suffixes: O output features, I input features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.guard import Pruned
from kernels.masks import keep_highest, keep_highest_of_rows
from kernels.obs import prune_obs
from kernels.refit import refit_survivors
from kernels.refit_steps import refit_in_steps
from kernels.scores import score_two_sided, score_wanda


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration text says of one layer (O output, I input features), all fp32."""

    mean_square_I: Tensor
    """a: mean square of each input feature."""
    gradient_square_O: Tensor
    """gamma: mean square of the loss gradient at each output feature."""
    second_moment_II: Tensor | None = None
    """A = mean of x x^T; only methods that change the survivors need it."""

    @property
    def moment_II(self) -> Tensor:
        """A. Raises ValueError when it was not collected."""
        if self.second_moment_II is None:
            raise ValueError("changing the survivors needs the second moment of the layer's inputs")
        return self.second_moment_II


def prune_magnitude(weight_OI: Tensor, _statistics: LayerStatistics, zeros: int) -> Pruned:
    """Lowest |W| of the whole layer."""
    return _mask(weight_OI, keep_highest(weight_OI.float().abs(), weight_OI == 0, zeros))


def prune_wanda(weight_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Pruned:
    """Wanda (arXiv 2306.11695): lowest |W| sqrt(a) of each output row."""
    score_OI = score_wanda(weight_OI, statistics.mean_square_I)
    return _mask(weight_OI, keep_highest_of_rows(score_OI, weight_OI == 0, zeros))


def prune_two_sided(weight_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Pruned:
    """Lowest W^2 a gamma of the whole layer."""
    score_OI = score_two_sided(weight_OI, statistics.mean_square_I, statistics.gradient_square_O)
    return _mask(weight_OI, keep_highest(score_OI, weight_OI == 0, zeros))


def prune_sparsegpt(weight_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Pruned:
    """SparseGPT (arXiv 2301.00774): lowest W^2 / U_jj^2 of each block of columns, the survivors updated."""
    return prune_obs(weight_OI, statistics.moment_II, zeros)


def prune_two_sided_obs(weight_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Pruned:
    """SparseGPT with scores weighed by gamma."""
    return prune_obs(weight_OI, statistics.moment_II, zeros, gradient_square_O=statistics.gradient_square_O)


def prune_refit(weight_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Pruned:
    """Billhook's own: the two-sided mask grown in steps, all survivors refitted between them."""
    return refit_in_steps(weight_OI, statistics.moment_II, statistics.gradient_square_O, zeros)


METHODS: dict[str, Callable[[Tensor, LayerStatistics, int], Pruned]] = {
    "magnitude": prune_magnitude,
    "wanda": prune_wanda,
    "two-sided": prune_two_sided,
    "sparsegpt": prune_sparsegpt,
    "two-sided-obs": prune_two_sided_obs,
    "refit": prune_refit,
}

MASK_ONLY = frozenset({"magnitude", "wanda", "two-sided"})
"""Methods that leave the survivors as they are."""


def prune_weight(method: str, weight_OI: Tensor, statistics: LayerStatistics, zeros: int, *, refit: bool) -> Tensor:
    """The pruned weight, in the dtype of `weight_OI`, with `zeros` zeros chosen by `method`.

    With `refit` the survivors become the damped least-squares fit to the dense layer's output. Raises ValueError
    when the statistics are not finite or the second moment is lacking where it is needed.
    """
    pruned_OI, keep_OI = METHODS[method](weight_OI, statistics, zeros)
    if refit:
        pruned_OI = refit_survivors(weight_OI, keep_OI, statistics.moment_II).to(weight_OI.dtype)
        if not bool(torch.isfinite(pruned_OI).all()):
            raise ValueError("the refit is not finite")
    # A survivor that an update (or fp16) brings to exactly 0 would be one zero too many.
    pruned_OI = torch.where(pruned_OI == 0, torch.finfo(pruned_OI.dtype).tiny, pruned_OI)
    return torch.where(keep_OI, pruned_OI, 0)  # and no -0.0, which a packed weight does not keep


def _mask(weight_OI: Tensor, keep_OI: Tensor) -> Pruned:
    return Pruned(torch.where(keep_OI, weight_OI, 0), keep_OI)
