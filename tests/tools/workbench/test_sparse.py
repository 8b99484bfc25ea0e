"""70 % and 80 %: exact, finite and quick to refuse, whatever prunes."""

import itertools
import math
import re

import pytest

from tests.benches import ignore
from tools.base.errors import ImpossiblePlan
from tools.plans.allocate import allocate
from tools.plans.methods import METHODS
from tools.plans.recipe import parse_recipe
from tools.plans.rules import RULES
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench

LABELS = [
    *(f"{name}:kappa-mask" for name in METHODS),
    *("two-sided+refit:kappa-mask", "refit10:kappa", "refit~clipped~sequential:kappa-mask"),
    *("refit~sequential:kappa-mask", "refit~damped0.3:kappa", "wanda+refit~damped10:kappa-mask"),
    *(f"refit:{name}" for name in RULES if name != "kappa"),
]


def test_every_recipe_is_exact_and_finite(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    sizes = {layer.name: layer.weight_OI.numel() for layer in bench.weights.layers}
    for sparsity, label in itertools.product((0.7, 0.8), LABELS):
        recipe = parse_recipe(label)
        layers = bench.curves.describe_layers(profile, recipe, ignore)
        allocation = allocate(layers, sparsity, recipe, max_layer_sparsity=0.95)
        checkpoint = bench.pruner.prune(profile, order_allocation(recipe, allocation), ignore)
        assert bench.weights.count_zeros() == (round(sparsity * sum(sizes.values())), sum(sizes.values())), label
        for layer in bench.weights.layers:
            zeros = int((layer.weight_OI == 0).sum())
            assert zeros == allocation.zeros[layer.name] <= math.ceil(0.95 * sizes[layer.name])
            assert bool(layer.weight_OI.isfinite().all()), label
        assert bench.evaluator.evaluate(checkpoint, "validation", profile, ignore).finite, label


def test_a_bound_that_no_allocation_meets_is_one_line(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    for rule in RULES:
        recipe = parse_recipe(f"refit:{rule}")
        layers = bench.curves.describe_layers(profile, recipe, ignore)
        with pytest.raises(ImpossiblePlan) as refusal:
            allocate(layers, 0.8, recipe, max_layer_sparsity=0.7)
        said = r"bounds and protected layers allow at most 70\.0\d% sparsity, but 80\.00% is asked"
        assert re.fullmatch(said, str(refusal.value)), "bounds hold to the whole weight"
        met = allocate(layers, 0.7, recipe, max_layer_sparsity=0.7).zeros
        assert sum(met.values()) == round(0.7 * sum(layer.weights for layer in layers))
