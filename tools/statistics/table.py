"""The table of a model's prunable layers: the paper's two scores, the outliers of each block, and the KL curves."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tools.models.layers import Layer
from tools.plans.layer_profile import LEVELS, LayerProfile
from tools.statistics.known import ModelStatistics
from tools.statistics.scores import compute_z_scores, measure_outliers, measure_peak, measure_wanda


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
