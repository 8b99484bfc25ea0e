"""How published allocations share sparsity out: OWL (arXiv 2310.05175) and AlphaPruning (arXiv 2410.10912).

What they measure of the weights is in `tools.statistics.scores`. Shape suffix: L layers.
"""

from collections.abc import Sequence

import numpy as np

from tools.plans.layer_profile import Array

OWL_LAMBDA = 0.08
"""OWL's lambda: keep ratios span twice this."""

ALPHA_EPSILON = 0.3
"""AlphaPruning's epsilon: sparsities span 1 - epsilon to 1 + epsilon of a common factor. The code's default, and its
value for Wanda; the published runs of LLaMA-2-7B have 0.5 for magnitude and 0.2 for SparseGPT."""


def rank_by_outliers(outliers_L: Array) -> Array:
    """OWL's keep ratio of each layer before the shift to the budget: 2 lambda (D - min D) / (max D - min D)."""
    return 2 * OWL_LAMBDA * _scale_to_unit(outliers_L)


def rank_by_alpha(alpha_L: Array, block_L: Sequence[int]) -> Array:
    """AlphaPruning's sparsity of each layer before the scaling to the budget, 1 - epsilon to 1 + epsilon.

    Linear in the mean alpha of the layer's block: every block needs a layer whose alpha is not NaN.
    """
    blocks = np.array(block_L)
    mean_L = np.empty(len(alpha_L))
    for block in set(block_L):
        mean_L[blocks == block] = np.nanmean(alpha_L[blocks == block])
    return 1 - ALPHA_EPSILON + 2 * ALPHA_EPSILON * _scale_to_unit(mean_L)


def _scale_to_unit(values: Array) -> Array:
    span = values.max() - values.min()
    scaled: Array = (values - values.min()) / (span if span > 0 else 1.0)
    return scaled
