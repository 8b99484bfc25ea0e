"""The pruning methods by name: from a layer's weights and statistics to its pruned weights.

Shape suffixes: O output features, I input features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from billhook_kernels.alps import Spectrum, prepare_spectrum, solve_alps
from billhook_kernels.guard import Pruned, damp_inputs, finish_update
from billhook_kernels.masks import (
    Pattern,
    check_pattern,
    keep_highest,
    keep_highest_of_groups,
    keep_wanda,
    score_two_sided,
    score_wanda,
)
from billhook_kernels.obs import InverseFactor, inverse_factor, prune_obs, prune_obs_groups
from billhook_kernels.preconditioner import System, prepare_system
from billhook_kernels.refit_steps import refit_in_levels, refit_in_steps, refit_survivors

PREPARES = {"alps": "spectrum", "sparsegpt": "factor", "two-sided-obs": "factor", "refit": "system"}
"""What of `LayerStatistics` a method asks for: made from A once, for all the layers that read the same inputs."""


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

    @cached_property
    def system(self) -> System | None:
        """`prepare_system(A)`, made once for all that these statistics are used for."""
        return prepare_system(self.moment_II)

    @cached_property
    def factor(self) -> InverseFactor:
        """`inverse_factor(A)`, likewise."""
        return inverse_factor(self.moment_II)

    @cached_property
    def spectrum(self) -> Spectrum | None:
        """`prepare_spectrum(A)`, likewise."""
        return prepare_spectrum(self.moment_II)

    def for_outputs(self, gradient_square_O: Tensor) -> "LayerStatistics":
        """The statistics of another layer that reads the same inputs; what was prepared from A is shared."""
        other = replace(self, gradient_square_O=gradient_square_O)
        made = {name: value for name, value in vars(self).items() if name in PREPARES.values()}
        vars(other).update(made, _damped=self._damped)
        return other

    def damp(self, share: float) -> System | None:
        """`prepare_system(damp_inputs(A, share))`; the last share's is kept, and shared as all that is made from A."""
        if not share:
            return self.system
        if share not in self._damped:
            self._damped.clear()
            self._damped[share] = prepare_system(damp_inputs(self.moment_II, share))
        return self._damped[share]

    @cached_property
    def _damped(self) -> dict[float, System | None]:
        return {}


def prune_magnitude(
    weight_OI: Tensor, statistics: LayerStatistics, zeros: int, pattern: Pattern | None = None
) -> Pruned:
    """Lowest |W| of the whole layer."""
    return _prune_lowest(weight_OI, weight_OI.float().abs(), zeros, pattern)


def prune_wanda(weight_OI: Tensor, statistics: LayerStatistics, zeros: int, pattern: Pattern | None = None) -> Pruned:
    """Wanda (arXiv 2306.11695): lowest |W| sqrt(a) of each output row."""
    if pattern is not None:
        return _prune_lowest(weight_OI, score_wanda(weight_OI, statistics.mean_square_I), zeros, pattern)
    _check_request(weight_OI, zeros, None)
    keep_OI = keep_wanda(weight_OI, statistics.mean_square_I, zeros)
    return Pruned(torch.where(keep_OI, weight_OI, 0), keep_OI)


def prune_two_sided(
    weight_OI: Tensor, statistics: LayerStatistics, zeros: int, pattern: Pattern | None = None
) -> Pruned:
    """Lowest W^2 a gamma of the whole layer. With a pattern it is Wanda: gamma is one factor for a whole group."""
    if pattern is not None:
        return prune_wanda(weight_OI, statistics, zeros, pattern)
    score_OI = score_two_sided(weight_OI, statistics.mean_square_I, statistics.gradient_square_O)
    return _prune_lowest(weight_OI, score_OI, zeros, pattern)


def prune_alps(weight_OI: Tensor, statistics: LayerStatistics, zeros: int, pattern: Pattern | None = None) -> Pruned:
    """ALPS (arXiv 2406.07831): ADMM chooses the mask, conjugate gradients refit its survivors."""
    _check_request(weight_OI, zeros, pattern)
    return solve_alps(weight_OI, statistics.moment_II, zeros, pattern=pattern, spectrum=statistics.spectrum)


def prune_sparsegpt(
    weight_OI: Tensor, statistics: LayerStatistics, zeros: int, pattern: Pattern | None = None
) -> Pruned:
    """SparseGPT (arXiv 2301.00774): lowest W^2 / U_jj^2 of each block of columns, the survivors updated."""
    return _prune_obs(weight_OI, statistics, zeros, pattern, None)


def prune_two_sided_obs(
    weight_OI: Tensor, statistics: LayerStatistics, zeros: int, pattern: Pattern | None = None
) -> Pruned:
    """SparseGPT with scores weighed by gamma. With a pattern it is SparseGPT."""
    return _prune_obs(weight_OI, statistics, zeros, pattern, statistics.gradient_square_O)


def prune_refit(
    weight_OI: Tensor,
    statistics: LayerStatistics,
    zeros: int,
    pattern: Pattern | None = None,
    *,
    steps: int = 5,
    damping: float = 0.0,
) -> Pruned:
    """Billhook's own: the two-sided mask grown in `steps` steps, all survivors refitted between them."""
    moment_II, gamma_O, system = statistics.moment_II, statistics.gradient_square_O, statistics.damp(damping)
    return refit_in_steps(
        weight_OI, moment_II, gamma_O, zeros, pattern=pattern, steps=steps, system=system, damping=damping
    )


METHODS: dict[str, Callable[[Tensor, LayerStatistics, int, Pattern | None], Pruned]] = {
    "magnitude": prune_magnitude,
    "wanda": prune_wanda,
    "two-sided": prune_two_sided,
    "alps": prune_alps,
    "sparsegpt": prune_sparsegpt,
    "two-sided-obs": prune_two_sided_obs,
    "refit": prune_refit,
}
"""By name: (weight, statistics, zeros, pattern = None) to the pruned layer.

With a pattern (N, M) the N lowest of every M consecutive inputs go, exact zeros first, and `zeros` must be what that
comes to. A group with more exact zeros than N keeps the others: a method that chooses a mask alone leaves them zero, so
that the layer may end with more zeros than `zeros`, while an update may fill them. Each raises ValueError in one line
when the layer has more exact zeros than `zeros` (without a pattern), when `zeros` or d_in do not fit the pattern, and
when the statistics are not finite or lack the second moment where it is needed.
"""


def prune_weight(
    method: str,
    weight_OI: Tensor,
    statistics: LayerStatistics,
    zeros: int,
    *,
    refit: bool,
    refit_steps: int = 5,
    damping: float = 0.0,
    pattern: Pattern | None = None,
) -> Pruned:
    """The layer pruned by `method`, in the dtype of `weight_OI`, with `zeros` zeros; for `pattern` see METHODS.

    With `refit` the survivors of its mask become the damped least-squares fit to the dense layer's output; rows which
    that leaves worse than the mask alone are those of the mask. `refit_steps` are those of the method "refit";
    with `damping` what it and `refit` fit to is `damp_inputs(A, damping)`. Raises ValueError as the methods do.
    """
    if method == "refit":
        pruned = prune_refit(weight_OI, statistics, zeros, pattern, steps=refit_steps, damping=damping)
    else:
        pruned = METHODS[method](weight_OI, statistics, zeros, pattern)
    if refit:
        pruned = _refit(weight_OI, pruned, statistics, damping)
    return _without_minus_zero(pruned)


def prune_levels(
    method: str,
    weight_OI: Tensor,
    statistics: LayerStatistics,
    zeros: Sequence[int],
    *,
    refit: bool,
    damping: float = 0.0,
) -> Iterator[Tensor]:
    """The weight as `prune_weight` would leave it at each of the ascending numbers `zeros`, made when it is asked for.

    What depends on the second moment alone is prepared once. The mask of the method "refit" grows through all the
    levels, as its steps: on SmolLM2's layers five of them cost a third of as many calls of `prune_weight`, and leave
    10 to 13 % more error, at all levels alike. A level that the layer's own exact zeros reach gives the dense weight.
    Raises ValueError as `prune_weight`, and with "refit" when `zeros` do not ascend.
    """
    present = int((weight_OI == 0).sum())
    grown = [count for count in zeros if count > present]
    levels: Iterator[Pruned]
    if method == "refit":
        moment_II, gamma_O, system = statistics.moment_II, statistics.gradient_square_O, statistics.damp(damping)
        levels = refit_in_levels(weight_OI, moment_II, gamma_O, grown, system=system, damping=damping)
    else:
        levels = (METHODS[method](weight_OI, statistics, count, None) for count in grown)
    for count in zeros:
        if count <= present:
            yield weight_OI
            continue
        pruned = next(levels)
        if refit:
            pruned = _refit(weight_OI, pruned, statistics, damping)
        yield _without_minus_zero(pruned).weight_OI


def _prune_lowest(weight_OI: Tensor, score_OI: Tensor, zeros: int, pattern: Pattern | None) -> Pruned:
    """A mask alone; scores are compared over the layer where there is no pattern."""
    _check_request(weight_OI, zeros, pattern)
    dead_OI = weight_OI == 0
    if pattern is not None:
        keep_OI = keep_highest_of_groups(score_OI, dead_OI, *pattern)
    else:
        keep_OI = keep_highest(score_OI, dead_OI, zeros)
    return Pruned(torch.where(keep_OI, weight_OI, 0), keep_OI)


def _check_request(weight_OI: Tensor, zeros: int, pattern: Pattern | None) -> None:
    if pattern is not None:
        check_pattern(weight_OI.shape, zeros, pattern)
        return
    weights = weight_OI.numel()
    present = weights - int(torch.count_nonzero(weight_OI))
    if not present <= zeros <= weights:
        raise ValueError(f"{zeros} zeros asked of a layer of {weights} weights that has {present} already")


def _prune_obs(
    weight_OI: Tensor,
    statistics: LayerStatistics,
    zeros: int,
    pattern: Pattern | None,
    gradient_square_O: Tensor | None,
) -> Pruned:
    if pattern is not None:
        check_pattern(weight_OI.shape, zeros, pattern)
        return prune_obs_groups(weight_OI, statistics.moment_II, *pattern, factor=statistics.factor)
    return prune_obs(
        weight_OI, statistics.moment_II, zeros, gradient_square_O=gradient_square_O, factor=statistics.factor
    )


def _refit(weight_OI: Tensor, pruned: Pruned, statistics: LayerStatistics, damping: float) -> Pruned:
    """The same mask with its survivors refitted."""
    moment_II, keep_OI = statistics.moment_II, pruned.keep_OI
    fitted_OI = refit_survivors(weight_OI, keep_OI, moment_II, system=statistics.damp(damping))
    return pruned._replace(weight_OI=finish_update(fitted_OI, weight_OI, keep_OI, moment_II, damping=damping))


def _without_minus_zero(pruned: Pruned) -> Pruned:
    """-0.0 becomes 0.0, so that what counts as zero, the mask and what is packed agree."""
    return pruned._replace(weight_OI=pruned.weight_OI + 0.0)
