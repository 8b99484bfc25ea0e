"""The speed of allocation over many layers."""

import numpy as np

from tools.experiments.speed import SPARSITY, Site, Task
from tools.plans.allocate import allocate
from tools.plans.layer_profile import LEVELS, LayerProfile
from tools.plans.recipe import Recipe
from tools.results.speed import Result

ALLOCATED_LAYERS = 400


def bench_allocation(site: Site) -> list[Result]:
    """Sharing sparsity out over many layers, against a second."""
    layers = make_profiles(ALLOCATED_LAYERS)
    recipe = Recipe(allocation="kappa", strength=0.8)
    (taken,) = site.time(Task(lambda: allocate(layers, SPARSITY, recipe, max_layer_sparsity=0.9)))
    what = f"allocation of {SPARSITY:.0%} over {len(layers)} layers by their KL curves"
    return [site.compare("allocation", what, taken, "one second", [1.0] * len(taken), 1.0)]


def make_profiles(count: int) -> list[LayerProfile]:
    """Made-up layers, seven to a block, whose KL curves differ in height and slope."""
    random = np.random.default_rng(0)
    return [
        LayerProfile(
            name=f"layers.{i // 7}.{i % 7}",
            block=i // 7,
            kind=str(i % 7),
            weights=int(random.integers(1, 64)) * 2**18,
            zeros=0,
            wanda=1.0,
            wanda_z=0.0,
            gradient=1.0,
            gradient_z=0.0,
            kappa=list(random.lognormal(-6, 1) * np.array(LEVELS) ** random.uniform(2, 4)),
        )
        for i in range(count)
    ]
