"""Seconds that pruning will take, before anything was pruned, from a few rows of each form of layer."""

from collections.abc import Mapping, Sequence

import torch

from tools.estimate.pruning import count_layers, time_layers
from tools.models.layers import Layer
from tools.plans.paces import Paces, name_measuring_curves, name_pruning_by
from tools.plans.recipe import Recipe


def foresee_paces(
    layers: Sequence[Layer], group: Mapping[str, str], device: torch.device, recipes: Sequence[Recipe]
) -> Paces:
    """Seconds of pruning all layers by each recipe, and of measuring the KL curves that it has beside the profile's.

    `group` has the first layer of those that read the same. By the dense model's statistics: what a walk behind pruned
    predecessors takes is not in it.
    """
    forms, widths = count_layers(layers, group, lambda _: 1)
    dtype, paces = layers[0].weight_OI.dtype, Paces()
    for recipe in recipes:
        paces[name_pruning_by([recipe])] = time_layers(recipe, forms, widths, dtype, device, 0.0, levels=False)
        if recipe.needs_curves:
            curves = time_layers(recipe, forms, widths, dtype, device, 0.0, levels=True)
            paces[name_measuring_curves(recipe)] = curves
    return paces
