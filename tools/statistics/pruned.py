"""What becomes of one layer: pruned by a recipe, or cut to the sparsities at which KL curves are measured.

Shape suffixes: I input features (d_in), O output features (d_out).
"""

from collections.abc import Iterator

from torch import Tensor

from billhook_kernels.guard import Pruned
from billhook_kernels.methods import LayerStatistics, prune_levels, prune_weight
from billhook_kernels.scores import score_two_sided
from billhook_kernels.statistics import level_of_each_weight, nested_parts
from tools.plans.layer_profile import LEVELS
from tools.plans.recipe import Recipe


def prune_layer(recipe: Recipe, dense_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Pruned:
    """The layer as the recipe leaves it, with its damping."""
    return prune_weight(
        recipe.method,
        dense_OI,
        statistics,
        zeros,
        refit=recipe.refits_after,
        refit_steps=recipe.steps,
        damping=recipe.fit_damping,
        pattern=recipe.group,
    )


def cut_to_levels(recipe: Recipe, dense_OI: Tensor, statistics: LayerStatistics) -> Iterator[Tensor]:
    """What the recipe's method changes of a layer at each of LEVELS beyond the last; fp32."""
    zeros = [round(level * dense_OI.numel()) for level in LEVELS]
    before_OI = dense_OI
    for pruned_OI in prune_levels(
        recipe.method, dense_OI, statistics, zeros, refit=recipe.refits_after, damping=recipe.fit_damping
    ):
        yield before_OI.float() - pruned_OI.float()
        before_OI = pruned_OI


def parts_of_mask(weight_OI: Tensor, mean_square_I: Tensor, gradient_square_O: Tensor) -> Iterator[Tensor]:
    """What the two-sided mask removes at each of LEVELS beyond the last; nothing is held before it is asked for."""
    score_OI = score_two_sided(weight_OI, mean_square_I, gradient_square_O)
    zeros = [round(level * weight_OI.numel()) for level in LEVELS]
    yield from nested_parts(weight_OI, level_of_each_weight(score_OI, weight_OI == 0, zeros), len(LEVELS))
