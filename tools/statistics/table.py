"""The table of a model's prunable layers: the paper's two scores, the outliers of each block, and the KL curves."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from billhook_kernels.guard import Pruned
from billhook_kernels.masks import score_two_sided, score_wanda
from billhook_kernels.methods import LayerStatistics, prune_levels, prune_weight
from billhook_kernels.statistics import level_of_each_weight, nested_parts
from tools.models.layers import Layer
from tools.plans.layer_profile import LEVELS, Array, LayerProfile
from tools.plans.recipe import Recipe
from tools.statistics.known import ModelStatistics


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


OUTLIER_TIMES_MEAN = 5.0
"""OWL's M: a score above this many times the mean of its block is an outlier."""

PEAK_BINS = 100
"""Bins, equal in log lambda, in which AlphaPruning looks for the peak of a spectrum."""


def measure_wanda(weight_OI: Tensor, mean_square_I: Tensor) -> float:
    """10th percentile of the Wanda scores of the active (non-zero) weights, exactly the ceil(n/10)-th smallest."""
    scores_N = score_wanda(weight_OI, mean_square_I).flatten()
    active = int(torch.count_nonzero(weight_OI))
    zeros = len(scores_N) - active  # whose scores are below all others: to leave them out would take longer
    return find_smallest(scores_N, zeros + -(-active // 10)) if active else 0.0


def find_smallest(values_N: Tensor, rank: int) -> float:
    """The `rank`-th smallest, counted from one, of fp32 values, none of them NaN: selected where they are."""
    if values_N.device.type == "cpu":  # where torch's selection takes many times as long as numpy's
        return float(np.partition(values_N.numpy(), rank - 1)[rank - 1])
    return float(values_N.kthvalue(rank).values)


def measure_peak(mean_square_I: Tensor) -> float:
    """Share of the strongest input in the mean squares (I,) of all; 0 where nothing is read."""
    whole = float(mean_square_I.sum(dtype=torch.float64))
    return float(mean_square_I.max()) / whole if whole > 0 else 0.0


def compute_z_scores(values: Sequence[float]) -> list[float]:
    """(v - mean) / std over all layers (arXiv 2601.09694); std of the population, 0 where all are alike."""
    array = np.array(values, dtype=np.float64)
    return [float(z) for z in (array - array.mean()) / (array.std() + 1e-12)]


def measure_outliers(weights: Sequence[Tensor], mean_squares: Sequence[Tensor]) -> float:
    """OWL's D of one block, in per cent: scores |W_ij| sqrt(a_j) above M times the mean over all layers of the block.

    `weights` are (O, I), `mean_squares` (I,). The scores are made twice rather than kept: no more than one layer's
    are in memory.
    """
    pairs = list(zip(weights, mean_squares, strict=True))
    count = sum(weight_OI.numel() for weight_OI in weights)
    mean = sum(float(score_wanda(w_OI, a_I).sum(dtype=torch.float64)) for w_OI, a_I in pairs) / count
    above = sum(int((score_wanda(w_OI, a_I) > OUTLIER_TIMES_MEAN * mean).sum()) for w_OI, a_I in pairs)
    return 100 * above / count


def measure_alpha(weight_OI: Tensor) -> float | None:
    """AlphaPruning's alpha of one layer, from the eigenvalues of W W^T; None when fewer than two are above zero.

    They are computed in float64 from the smaller of W W^T and W^T W, which loses less than the published code's
    singular values in fp32.
    """
    weight_OI = weight_OI.double()
    outputs, inputs = weight_OI.shape
    gram = weight_OI @ weight_OI.T if outputs <= inputs else weight_OI.T @ weight_OI
    return fit_tail(torch.linalg.eigvalsh(gram).cpu().numpy())


def fit_tail(eigenvalues_N: Array) -> float | None:
    """Hill's estimate alpha = 1 + n / sum_i ln(lambda_i / lambda_min) over the n eigenvalues from lambda_min up.

    `eigenvalues_N` ascend. This is `alpha_peak`, the published code's default and the one behind the paper's tables,
    not its `alpha_mid` (lambda_min = the median): of the eigenvalues around the peak of the log spectrum, lambda_min
    is the one whose tail is nearest to a power law by Kolmogorov and Smirnov. "Around" is from log10(0.95 peak) to
    1.5 peak. The logarithm looks like a slip, and makes alpha depend on the scale of the weights, but it is what was
    published. Unlike there, eigenvalues that are zero to rounding are left out.
    """
    floor = 10 * np.finfo(np.float64).eps * max(float(eigenvalues_N[-1]), 0.0)
    spectrum_N = eigenvalues_N[eigenvalues_N > floor]
    if len(spectrum_N) < 2:
        return None
    log_N = np.log(spectrum_N)
    counts, edges = np.histogram(log_N / np.log(10), bins=PEAK_BINS)
    peak = 10 ** edges[np.argmax(counts)]
    first = np.searchsorted(spectrum_N, np.log10(0.95 * peak))
    end = np.searchsorted(spectrum_N[:-1], 1.5 * peak, side="right")
    alpha, nearest = None, np.inf
    for start in range(first, end):
        tail = log_N[start:] - log_N[start]
        slope = len(tail) / max(float(tail.sum()), 1e-300)  # alpha - 1
        distance = np.abs(1 - np.exp(-slope * tail) - np.arange(len(tail)) / len(tail)).max()
        if distance < nearest:
            alpha, nearest = 1 + slope, distance
    return alpha


def build_profile(
    layers: Sequence[Layer],
    statistics: ModelStatistics,
    dense: Mapping[str, Tensor] | None = None,
) -> list[LayerProfile]:
    """The table of layers, with z-scores over all of them; of the `dense` weights where they are given.

    The weights of one block at a time are read.
    """
    bare, wanda, outliers = dict[str, LayerProfile](), dict[str, float](), dict[int, float]()
    for block in sorted({layer.block for layer in layers}):
        members = {layer: _weight(layer, dense) for layer in layers if layer.block == block}
        for layer, weight_OI in members.items():
            bare[layer.name] = _describe(layer, weight_OI)
            wanda[layer.name] = measure_wanda(weight_OI, statistics.mean_square[layer.name])
        outliers[block] = measure_outliers(
            list(members.values()), [statistics.mean_square[layer.name] for layer in members]
        )
    wanda_z = compute_z_scores([wanda[layer.name] for layer in layers])
    gradient_z = compute_z_scores([statistics.gradient[layer.name] for layer in layers])
    return [
        bare[layer.name].model_copy(
            update={
                "wanda": wanda[layer.name],
                "wanda_z": w_z,
                "gradient": statistics.gradient[layer.name],
                "gradient_z": g_z,
                "kappa": statistics.kappa[layer.name],
                "outliers": outliers[layer.block],
                "peak": measure_peak(statistics.mean_square[layer.name]),
            }
        )
        for layer, w_z, g_z in zip(layers, wanda_z, gradient_z, strict=True)
    ]


def list_weights(layers: Sequence[Layer], dense: Mapping[str, Tensor]) -> list[LayerProfile]:
    """The table of layers before anything is known of them: how many of the `dense` weights there are, and are zero.

    All scores and curves are 0.
    """
    return [_describe(layer, _weight(layer, dense)) for layer in layers]


def list_shapes(layers: Sequence[Layer], dense: Mapping[str, Tensor] | None = None) -> list[LayerProfile]:
    """As `list_weights`, without a look at any weight: none is taken to be zero. Without `dense` by the model's own."""
    return [_describe(layer, layer.weight_OI if dense is None else dense[layer.name], zeros=0) for layer in layers]


def _describe(layer: Layer, weight_OI: Tensor, zeros: int | None = None) -> LayerProfile:
    return LayerProfile(
        name=layer.name,
        block=layer.block,
        kind=layer.kind,
        weights=weight_OI.numel(),
        zeros=int((weight_OI == 0).sum()) if zeros is None else zeros,
        wanda=0.0,
        wanda_z=0.0,
        gradient=0.0,
        gradient_z=0.0,
        kappa=[0.0] * len(LEVELS),
        inputs=weight_OI.shape[1],
    )


def _weight(layer: Layer, dense: Mapping[str, Tensor] | None) -> Tensor:
    return (layer.weight_OI if dense is None else dense[layer.name]).to(layer.device)
