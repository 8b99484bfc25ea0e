"""Arms that are no runs of the graph: one plan, random plans, and a search, on the workbench itself."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from graph.ablation.settings import AblateSettings
from tools.base.errors import BrokenPlan, ImpossiblePlan, UserError
from tools.plans.allocate import Allocation, allocate
from tools.plans.evolve import describe_search
from tools.plans.layer_profile import LayerProfile, group_layers
from tools.plans.recipe import Adjustment, Recipe
from tools.plans.work_order import order_allocation
from tools.workbench.search import search_allocation

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench

RANDOM_METHODS = ("two-sided", "sparsegpt", "two-sided-obs", "refit")
RANDOM_STRENGTHS = (0.8, 0.9, 1.0)
RANDOM_GROUPS = 4
"""Groups of layers that a random plan counts otherwise than predicted."""
RANDOM_FACTORS = (0.5, 2.0)


class Choice(NamedTuple):
    """What an arm chose."""

    checkpoint: str
    plan: str
    trials: int
    tokens: int


def _share_out(
    bench: "Workbench",
    profile: str,
    settings: AblateSettings,
    recipe: Recipe,
    adjustments: Sequence[Adjustment],
    progress: "Progress",
) -> Allocation:
    """Raises ImpossiblePlan."""
    layers = bench.describe_layers(profile, recipe, progress)
    limit = settings.max_layer_sparsity
    return allocate(layers, settings.target_sparsity, recipe, adjustments, max_layer_sparsity=limit)


def try_kappa(bench: "Workbench", profile: str, settings: AblateSettings, progress: "Progress") -> Choice:
    recipe = Recipe()
    allocation = _share_out(bench, profile, settings, recipe, [], progress)
    checkpoint = bench.prune(profile, order_allocation(recipe, allocation), progress)
    return Choice(checkpoint, recipe.label, 1, settings.validation_tokens)


def try_random(bench: "Workbench", profile: str, settings: AblateSettings, progress: "Progress") -> Choice:
    """As many random plans as the budget allows; the one of least KL on the validation text."""
    tokens = settings.validation_tokens
    trials = settings.evaluated_tokens // tokens
    best: tuple[float, str, str] | None = None
    for first in range(0, trials, bench.abreast):
        tried: list[tuple[str, str]] = []
        for number in range(first, min(first + bench.abreast, trials)):
            recipe, adjustments = draw_plan(bench.read_profile(profile).layers, settings.seed, number)
            with suppress(ImpossiblePlan):
                allocation = _share_out(bench, profile, settings, recipe, adjustments, progress)
                tried.append((bench.prune(profile, order_allocation(recipe, allocation), progress), recipe.label))
        windows = len(bench.windows.validation)
        try:
            evaluations = bench.evaluate_each([checkpoint for checkpoint, _ in tried], windows, profile, progress)
        except BrokenPlan:
            continue
        for (checkpoint, label), evaluation in zip(tried, evaluations, strict=True):
            kl = math.inf if evaluation.mean_kl is None else evaluation.mean_kl
            if best is None or kl < best[0]:
                best = kl, checkpoint, label
        if best is not None:
            bench.forget_checkpoints([best[1]])
    if best is None:
        raise UserError(f"no random plan can meet {settings.target_sparsity:.2%}; raise --max-layer-sparsity")
    return Choice(best[1], best[2], trials, trials * tokens)


def draw_plan(layers: Sequence[LayerProfile], seed: int, number: int) -> tuple[Recipe, list[Adjustment]]:
    """A plan drawn from the levers that a planner has, of this seed and number alone."""
    generator = np.random.default_rng([seed, number])

    def pick(values: Sequence[Any]) -> Any:
        return values[int(generator.integers(len(values)))]

    method = pick(RANDOM_METHODS)
    recipe = Recipe(
        method=method,
        refit=method == "refit" or pick((True, False)),
        allocation=pick(("kappa", "kappa", "uniform", "owl")),
        curves="mask",
        strength=pick(RANDOM_STRENGTHS),
        gamma=pick(("plain", "clipped")),
    )
    if not recipe.reads_curves:  # factors count only where those are read
        return recipe, []
    groups = sorted(group_layers(layers))
    chosen = generator.choice(len(groups), min(RANDOM_GROUPS, len(groups)), replace=False)
    low, high = np.log(RANDOM_FACTORS)
    return recipe, [
        Adjustment(
            selector=groups[place], action="factor", factor=round(float(np.exp(generator.uniform(low, high))), 3)
        )
        for place in sorted(chosen.tolist())
    ]


def try_search(bench: "Workbench", profile: str, settings: AblateSettings, progress: "Progress") -> Choice:
    """EvoPress's super-fast search, as long as the tokens allow, with the weights of the default recipe."""
    recipe = Recipe(allocation="uniform")
    found = search_allocation(
        bench,
        profile,
        recipe,
        settings.target_sparsity,
        progress,
        tokens=settings.evaluated_tokens,
        max_layer_sparsity=settings.max_layer_sparsity,
    )
    checkpoint = bench.prune(profile, order_allocation(recipe, found.allocation), progress)
    assert found.searched is not None
    length = describe_search(*found.searched[:3], found.tokens)
    return Choice(checkpoint, f"{recipe.mask_label}:evolution, {length}", found.searched.measured, found.tokens)


TRIES: dict[str, Callable[["Workbench", str, AblateSettings, "Progress"], Choice]] = {
    "kappa": try_kappa,
    "random": try_random,
    "search": try_search,
}
"""How each arm finds what it chooses, from (workbench, hash of the profile, settings, progress)."""
