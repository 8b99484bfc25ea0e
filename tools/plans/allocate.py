"""From a plan to exact per-layer sparsities (a tool)."""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, Field

from tools.base.errors import ImpossiblePlan
from tools.plans.budget import Budget, round_to_budget, same_sparsity
from tools.plans.layer_profile import Array, LayerProfile, predict_kl, select_layers
from tools.plans.pattern import count_pattern_zeros
from tools.plans.recipe import Adjustment, Recipe
from tools.plans.rules import RULES, share_evenly

Pattern = tuple[int, int]
"""(N zeros, of M consecutive inputs)."""


class Allocation(BaseModel):
    """How many weights of each layer are zero, and what that is predicted to cost."""

    zeros: dict[str, int] = Field(description="Layer name to number of zero weights, in layer order.")
    sparsity: float = Field(description="Share of all prunable weights that are zero.")
    predicted_kl: float = Field(description="Sum of the unweighted KL curves, nats per token.")


def allocate(
    layers: Sequence[LayerProfile],
    sparsity: float,
    recipe: Recipe,
    adjustments: Sequence[Adjustment] = (),
    *,
    protect: Sequence[str] = (),
    max_layer_sparsity: float = 1.0,
    patterns: Mapping[str, Pattern] | None = None,
) -> Allocation:
    """Share `sparsity` out over the layers, exactly to the weight.

    `recipe.allocation` says how (`tools.plans.rules`), and `recipe.strength` mixes any rule with uniform.
    Factors of adjustments weigh the KL curves.

    With `recipe.pattern` N:M every layer that is not protected gets N zeros of every M weights instead, whatever the
    allocation and its strength; `sparsity` has to agree with what that makes of the model. With `patterns` the layers
    that these name do, and the others share out what is left.

    Raises ImpossiblePlan when bounds and protected layers cannot meet the budget, the profile lacks what the
    allocation or pattern needs, or factors are given that would count for nothing.
    """
    patterns = dict.fromkeys((layer.name for layer in layers), recipe.group) if recipe.group else patterns or {}
    if any(a.action == "factor" for a in adjustments):
        _refuse_idle_factors(recipe)
    _refuse_factors_of_patterns(adjustments, layers, patterns)
    sizes = np.array([layer.weights for layer in layers], dtype=np.float64)
    least, most = find_bounds(layers, adjustments, protect=protect, max_layer_sparsity=max_layer_sparsity)
    untouched = _find_protected(layers, adjustments, protect)
    patterned = [i for i, layer in enumerate(layers) if layer.name in patterns and i not in set(untouched)]
    for i in patterned:
        least[i] = most[i] = _count_fitting(layers[i], patterns[layers[i].name], least[i], most[i])
    if patterns and len(patterned) + len(untouched) == len(layers):
        zeros = least
        _refuse_other_sparsity(zeros.sum() / sizes.sum(), sparsity, recipe)
    else:
        own = [(_find_layers(a.selector, layers), a.factor or 1.0) for a in adjustments if a.action == "factor"]
        budget = Budget(layers, sizes, round(sparsity * sizes.sum()), least / sizes, most / sizes, own)
        _refuse_impossible(budget.zeros, sizes.sum(), least.sum(), most.sum(), "patterns, " if patterned else "")
        zeros = round_to_budget(_share_out(budget, recipe) * sizes, budget.zeros, least, most)
    return describe_zeros(layers, {layer.name: int(z) for layer, z in zip(layers, zeros, strict=True)})


def describe_zeros(layers: Sequence[LayerProfile], zeros: dict[str, int]) -> Allocation:
    """The allocation that has so many zeros in each layer."""
    shares = np.array([zeros[layer.name] / layer.weights for layer in layers])
    total = sum(layer.weights for layer in layers)
    return Allocation(zeros=zeros, sparsity=sum(zeros.values()) / total, predicted_kl=predict_kl(layers, shares))


def find_bounds(
    layers: Sequence[LayerProfile],
    adjustments: Sequence[Adjustment] = (),
    *,
    protect: Sequence[str] = (),
    max_layer_sparsity: float = 1.0,
) -> tuple[Array, Array]:
    """(least, most) zeros of each layer, whole numbers; those of the dense weights are a lower bound.

    Raises ImpossiblePlan when a layer's are at odds.
    """
    sizes = np.array([layer.weights for layer in layers], dtype=np.float64)
    dense = np.array([layer.zeros for layer in layers]) / sizes
    low, high = dense.copy(), np.full(len(layers), max_layer_sparsity)
    for adjustment in adjustments:
        chosen = _find_layers(adjustment.selector, layers)
        if adjustment.action == "bounds":
            low[chosen] = np.maximum(low[chosen], adjustment.low or 0.0)
            high[chosen] = np.minimum(high[chosen], 1.0 if adjustment.high is None else adjustment.high)
            for i in chosen:
                if low[i] > max(high[i], dense[i]):
                    raise ImpossiblePlan(
                        f"{adjustment.selector!r}: the least sparsity asked of {layers[i].name}, {low[i]:g}, is above "
                        f"the greatest, {high[i]:g}"
                    )
    untouched = _find_protected(layers, adjustments, protect)
    high = np.maximum(high, dense)
    low[untouched] = high[untouched] = dense[untouched]
    return np.floor(low * sizes + 1e-6), np.ceil(high * sizes - 1e-6)  # bounds hold to the whole weight


def _find_layers(selector: str, layers: Sequence[LayerProfile]) -> list[int]:
    names = set(select_layers(selector, layers))
    return [i for i, layer in enumerate(layers) if layer.name in names]


def _find_protected(
    layers: Sequence[LayerProfile], adjustments: Sequence[Adjustment], protect: Sequence[str]
) -> list[int]:
    guarded = [*protect, *(a.selector for a in adjustments if a.action == "protect")]
    return sorted({i for selector in guarded for i in _find_layers(selector, layers)})


def _refuse_idle_factors(recipe: Recipe) -> None:
    """A factor weighs a KL curve: raises ImpossiblePlan where nobody reads those, so that it would do nothing."""
    if not recipe.reads_curves:
        pattern = recipe.group
        user = f"an N:M pattern ({pattern[0]}:{pattern[1]})" if pattern else f"allocation {recipe.allocation!r}"
        readers = " or ".join(repr(way.name) for way in RULES.values() if way.reads_curves)
        raise ImpossiblePlan(f"factors count only in allocation {readers}, not with {user}; use bounds or protect")


def _refuse_factors_of_patterns(
    adjustments: Sequence[Adjustment], layers: Sequence[LayerProfile], patterns: Mapping[str, Pattern]
) -> None:
    """Raises ImpossiblePlan for a factor that is about no layer but such as patterns say all of."""
    for selector in (a.selector for a in adjustments if a.action == "factor"):
        if patterns.keys() >= set(select_layers(selector, layers)):
            raise ImpossiblePlan(f"{selector!r}: a factor counts for nothing where an N:M pattern says all")


def _refuse_impossible(budget: int, total: float, least: float, most: float, patterns: str) -> None:
    if budget > most:
        bounds = f"bounds, {patterns}" if patterns else "bounds "
        raise ImpossiblePlan(
            f"{bounds}and protected layers allow at most {most / total:.2%} sparsity, but {budget / total:.2%} is asked"
        )
    if budget < least:
        raise ImpossiblePlan(
            f"{patterns}bounds (and zeros the model already has) ask for at least {least / total:.2%} sparsity, "
            f"but the plan has {budget / total:.2%}"
        )


def _count_fitting(layer: LayerProfile, pattern: Pattern, least: float, most: float) -> int:
    """Zeros of a layer in which N of every M weights go. Raises ImpossiblePlan where they do not fit in its bounds."""
    pruned, group = pattern
    if not layer.inputs:
        raise ImpossiblePlan(f"this profile has no number of inputs for {layer.name}, which a pattern needs")
    if layer.inputs % group:
        raise ImpossiblePlan(
            f"{layer.name} has {layer.inputs} inputs, not divisible into groups of {group}; protect it, or use "
            "another pattern"
        )
    zeros = count_pattern_zeros(layer.weights, pattern)
    if not least <= zeros <= most:
        raise ImpossiblePlan(
            f"{pruned}:{group} makes {pruned / group:.2%} of {layer.name} zero, but bounds (and zeros it already "
            f"has) ask for {least / layer.weights:.2%} to {most / layer.weights:.2%}"
        )
    return zeros


def _refuse_other_sparsity(given: float, sparsity: float, recipe: Recipe) -> None:
    """Where patterns leave nothing to share out, a plan's sparsity is theirs."""
    if not same_sparsity(given, sparsity):
        raise ImpossiblePlan(
            f"with {recipe.pattern or 'patterns'} in every layer that is not protected the sparsity is {given:.2%}, "
            f"but the plan has {sparsity:.2%}"
        )


def _share_out(budget: Budget, recipe: Recipe) -> Array:
    """The sparsity of each layer as the recipe has it, at the budget but for rounding."""
    share = RULES[recipe.allocation].share
    assert share is not None, "every rule has its function"
    even = share_evenly(budget)
    return even + recipe.strength * (share(budget) - even)
