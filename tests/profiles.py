"""Layer profiles made up for tests that need no model."""

from collections.abc import Sequence

from tools.plans.layer_profile import LayerProfile


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
