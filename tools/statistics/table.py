"""The table of a model's prunable layers: the paper's two scores, the outliers of each block, and the KL curves."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tools.models.layers import Layer
from tools.plans.layer_profile import LayerProfile
from tools.statistics.known import ModelStatistics
from tools.statistics.scores import compute_z_scores, measure_outliers, measure_wanda


def build_profile(
    layers: Sequence[Layer],
    statistics: ModelStatistics,
    dense: Mapping[str, Tensor] | None = None,
) -> list[LayerProfile]:
    """The table of layers, with z-scores over all of them; of the `dense` weights where they are given."""
    weights = [_weight(layer, dense) for layer in layers]
    wanda = [
        measure_wanda(weight_OI, statistics.mean_square[layer.name])
        for layer, weight_OI in zip(layers, weights, strict=True)
    ]
    gradient = [statistics.gradient[layer.name] for layer in layers]
    outliers: dict[int, float] = {}
    for block in sorted({layer.block for layer in layers}):
        members = [
            (w, statistics.mean_square[x.name]) for x, w in zip(layers, weights, strict=True) if x.block == block
        ]
        outliers[block] = measure_outliers([w for w, _ in members], [a for _, a in members])
    return [
        LayerProfile(
            name=layer.name,
            block=layer.block,
            kind=layer.kind,
            weights=weight_OI.numel(),
            zeros=int((weight_OI == 0).sum()),
            wanda=w,
            wanda_z=w_z,
            gradient=g,
            gradient_z=g_z,
            kappa=statistics.kappa[layer.name],
            inputs=weight_OI.shape[1],
            outliers=outliers[layer.block],
        )
        for layer, weight_OI, w, w_z, g, g_z in zip(
            layers, weights, wanda, compute_z_scores(wanda), gradient, compute_z_scores(gradient), strict=True
        )
    ]


def _weight(layer: Layer, dense: Mapping[str, Tensor] | None) -> Tensor:
    return layer.weight_OI if dense is None else dense[layer.name].to(layer.weight_OI.device)
