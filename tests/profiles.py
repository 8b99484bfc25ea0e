"""Layer profiles made up for tests that need no model."""

from collections.abc import Sequence

import numpy as np

from tools.base.errors import ImpossiblePlan
from tools.plans.layer_profile import LEVELS, LayerProfile

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
"""Kinds of the layers that `make_layers` gives every block."""


def make_profile(
    block: int,
    kind: str,
    weights: int,
    kappa: Sequence[float],
    zeros: int = 0,
    wanda_z: float = 0.0,
    gradient_z: float = 0.0,
) -> LayerProfile:
    """A layer with the KL curve `kappa`, named as in a Llama."""
    return LayerProfile(
        name=f"model.layers.{block}.{kind}",
        block=block,
        kind=kind,
        weights=weights,
        zeros=zeros,
        wanda=1.0,
        wanda_z=wanda_z,
        gradient=1.0,
        gradient_z=gradient_z,
        kappa=list(kappa),
    )


def make_layers(blocks: int = 4, weights: int = 10_007, seed: int = 0) -> list[LayerProfile]:
    """Layers of different sizes and growing, convex KL curves over three orders of magnitude."""
    generator = np.random.default_rng(seed)
    layers = [
        make_profile(
            block,
            kind,
            weights * (1 + kind.startswith("mlp")),
            10 ** generator.uniform(-5, -2) * np.exp(6 * np.array(LEVELS)),
        )
        for block in range(blocks)
        for kind in KINDS
    ]
    outliers, alpha = generator.uniform(0.5, 8, blocks), generator.uniform(2, 6, len(layers))
    return [
        layer.model_copy(update={"outliers": outliers[layer.block], "alpha": alpha[i]})
        for i, layer in enumerate(layers)
    ]


def check_sentence(refusal: ImpossiblePlan) -> None:
    """One line that a planner can read."""
    assert "\n" not in str(refusal)
    assert 20 < len(str(refusal)) < 400
