"""From a plan to exact per-layer sparsities (a tool)."""

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, Field

from tools.base.errors import ImpossiblePlan
from tools.plans.layer_profile import Array, LayerProfile, predict_kl, predict_layer_kl
from tools.plans.recipe import Adjustment, Recipe, count_pattern_zeros
from tools.plans.rules import rank_by_alpha, rank_by_outliers
from tools.plans.selectors import select_layers

_GRID = np.linspace(0, 1, 801)
"""Sparsities a layer may take before the last rounding."""

_PATTERN_TOLERANCE = 5e-4
"""A plan may name the sparsity that an N:M pattern gives this roughly: the promise is the plan's within 0.05 %."""


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
) -> Allocation:
    """Share `sparsity` out over the layers, exactly to the weight.

    `recipe.allocation` says how: kappa minimises sum_l w_l kappa_l(s_l) at the budget and within bounds by bisection
    on the multiplier of the budget (the problem is separable); owl and alphapruning follow their papers
    (`tools.plans.rules`), shifted or scaled and clipped to the bounds until they meet the budget; uniform is the same
    everywhere. `recipe.strength` mixes any of them with uniform.

    With `recipe.pattern` N:M every layer that is not protected gets N zeros of every M weights instead, whatever the
    allocation and its strength; `sparsity` has to agree with what that makes of the model.

    Raises ImpossiblePlan when bounds and protected layers cannot meet the budget, the profile lacks what the
    allocation or pattern needs, or factors are given that would count for nothing.
    """
    pattern = recipe.group
    _refuse_idle_factors(recipe, adjustments, pattern)
    sizes = np.array([layer.weights for layer in layers], dtype=np.float64)
    least, most = find_bounds(layers, adjustments, protect=protect, max_layer_sparsity=max_layer_sparsity)
    if pattern:
        untouched = _find_protected(layers, adjustments, protect)
        zeros = _fill_pattern(layers, sparsity, pattern, untouched, least, most)
    else:
        budget = round(sparsity * sizes.sum())
        _refuse_impossible(budget, sizes.sum(), least.sum(), most.sum())
        shares = _share_out(layers, recipe, adjustments, budget, least / sizes, most / sizes)
        zeros = _round_to_budget(shares * sizes, budget, least, most)
    return Allocation(
        zeros={layer.name: int(z) for layer, z in zip(layers, zeros, strict=True)},
        sparsity=float(zeros.sum() / sizes.sum()),
        predicted_kl=predict_kl(layers, zeros / sizes),
    )


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


def _refuse_idle_factors(recipe: Recipe, adjustments: Sequence[Adjustment], pattern: tuple[int, int] | None) -> None:
    """A factor weighs a KL curve, and only the kappa allocation reads those: elsewhere it would do nothing."""
    if any(a.action == "factor" for a in adjustments) and (pattern or recipe.allocation != "kappa"):
        user = f"an N:M pattern ({pattern[0]}:{pattern[1]})" if pattern else f"allocation {recipe.allocation!r}"
        raise ImpossiblePlan(f"factors count only in allocation 'kappa', not with {user}; use bounds or protect")


def _refuse_impossible(budget: int, total: float, least: float, most: float) -> None:
    if budget > most:
        raise ImpossiblePlan(
            f"bounds and protected layers allow at most {most / total:.2%} sparsity, but {budget / total:.2%} is asked"
        )
    if budget < least:
        raise ImpossiblePlan(
            f"bounds (and zeros the model already has) ask for at least {least / total:.2%} sparsity, "
            f"but the plan has {budget / total:.2%}"
        )


def _fill_pattern(
    layers: Sequence[LayerProfile],
    sparsity: float,
    pattern: tuple[int, int],
    untouched: Sequence[int],
    least: Array,
    most: Array,
) -> Array:
    """Zeros of each layer: N of every M weights, but of protected layers only those that they have."""
    pruned, group = pattern
    zeros = np.array([layer.zeros for layer in layers], dtype=np.float64)
    for i in sorted(set(range(len(layers))) - set(untouched)):
        layer = layers[i]
        if not layer.inputs:
            raise ImpossiblePlan(f"this profile has no number of inputs for {layer.name}, which a pattern needs")
        if layer.inputs % group:
            raise ImpossiblePlan(
                f"{layer.name} has {layer.inputs} inputs, not divisible into groups of {group}; protect it, or use "
                "another pattern"
            )
        zeros[i] = count_pattern_zeros(layer.weights, pattern)
        if not least[i] <= zeros[i] <= most[i]:
            raise ImpossiblePlan(
                f"{pruned}:{group} makes {pruned / group:.2%} of {layer.name} zero, but bounds (and zeros it already "
                f"has) ask for {least[i] / layer.weights:.2%} to {most[i] / layer.weights:.2%}"
            )
    given = zeros.sum() / sum(layer.weights for layer in layers)
    if abs(given - sparsity) > _PATTERN_TOLERANCE:
        raise ImpossiblePlan(
            f"with {pruned}:{group} in every layer that is not protected the sparsity is {given:.2%}, but the plan has "
            f"{sparsity:.2%}"
        )
    return zeros


def _share_out(
    layers: Sequence[LayerProfile],
    recipe: Recipe,
    adjustments: Sequence[Adjustment],
    budget: int,
    low: Array,
    high: Array,
) -> Array:
    """The sparsity of each layer as the recipe has it, at the budget but for rounding."""
    sizes = np.array([layer.weights for layer in layers], dtype=np.float64)
    even = _meet_budget(lambda level: np.full(len(sizes), level), 1.0, sizes, budget, low, high)
    wanted = even
    if recipe.allocation == "kappa":
        curves = np.stack([predict_layer_kl(layer, _GRID) for layer in layers])
        for adjustment in adjustments:
            if adjustment.action == "factor":
                curves[_find_layers(adjustment.selector, layers)] *= adjustment.factor or 1.0
        cheapest = _minimise_kl(curves, sizes, budget, low, high)
        if _total_kl(curves, cheapest) < _total_kl(curves, even):  # a curve that bends down can mislead the search
            wanted = cheapest
    elif recipe.allocation == "owl":
        keep = rank_by_outliers(_read_outliers(layers))
        wanted = _meet_budget(lambda shift: shift - keep, 1 + keep.max(), sizes, budget, low, high)
    elif recipe.allocation == "alphapruning":
        share = rank_by_alpha(_read_alpha(layers), [layer.block for layer in layers])
        wanted = _meet_budget(lambda scale: scale * share, 1 / share.min(), sizes, budget, low, high)
    return even + recipe.strength * (wanted - even)


def _read_outliers(layers: Sequence[LayerProfile]) -> Array:
    outliers = np.array([layer.outliers for layer in layers], dtype=np.float64)  # None becomes NaN
    if np.isnan(outliers).any():
        raise ImpossiblePlan("this profile has no shares of outliers, which allocation 'owl' needs; take another")
    return outliers


def _read_alpha(layers: Sequence[LayerProfile]) -> Array:
    """The layers' alphas, NaN where a layer has none; every block has a layer that has one."""
    alpha = np.array([layer.alpha for layer in layers], dtype=np.float64)
    known = {layer.block for layer in layers if layer.alpha is not None}
    lacking = sorted({layer.block for layer in layers} - known)
    if lacking:
        raise ImpossiblePlan(
            f"this profile has no alpha of block {lacking[0]}, which allocation 'alphapruning' needs; take another"
        )
    return alpha


def _meet_budget(
    shares_at: Callable[[float], Array], end: float, sizes: Array, budget: int, low: Array, high: Array
) -> Array:
    """`shares_at` of a number from 0 to `end`, clipped to the bounds, found by bisection so that the budget is met."""
    least, most = 0.0, end
    for _ in range(60):
        middle = (least + most) / 2
        if (np.clip(shares_at(middle), low, high) * sizes).sum() > budget:
            most = middle
        else:
            least = middle
    shares: Array = np.clip(shares_at(least), low, high)
    return shares


def _minimise_kl(curves: Array, sizes: Array, budget: int, low: Array, high: Array) -> Array:
    """Sparsities minimising the sum of `curves` (layers x _GRID) at the budget."""
    allowed = (_GRID >= low[:, None]) & (_GRID <= high[:, None])
    curves = np.where(allowed, curves, np.inf)
    amounts = sizes[:, None] * _GRID
    cost = np.empty_like(amounts)

    def choose(log_price: float) -> Array:
        np.subtract(curves, np.multiply(amounts, np.exp(log_price), out=cost), out=cost)
        best = _GRID[np.argmin(cost, axis=1)]
        chosen: Array = np.clip(np.where(allowed.any(axis=1), best, low), low, high)  # bounds closer than the grid
        return chosen

    cheap, dear = -80.0, 40.0
    for _ in range(60):  # after which the two are neighbouring numbers
        middle = (cheap + dear) / 2
        if (choose(middle) * sizes).sum() > budget:
            dear = middle
        else:
            cheap = middle
    return _blend_to_budget([low, choose(cheap), choose(dear), high], sizes, budget)


def _total_kl(curves: Array, sparsity: Array) -> float:
    return sum(float(np.interp(s, _GRID, curve)) for s, curve in zip(sparsity, curves, strict=True))


def _blend_to_budget(stages: list[Array], sizes: Array, budget: int) -> Array:
    """The point on the path through ever sparser `stages` whose weighted sum is the budget."""
    totals = [float((stage * sizes).sum()) for stage in stages]
    for before, after, start, end in zip(stages, stages[1:], totals, totals[1:], strict=False):
        if start <= budget <= end:
            share = (budget - start) / (end - start) if end > start else 0.0
            return before + share * (after - before)
    return stages[0] if budget < totals[0] else stages[-1]


def _round_to_budget(wanted: Array, budget: int, low: Array, high: Array) -> Array:
    """Whole numbers that sum to the budget, each as near to `wanted` as bounds allow."""
    whole = np.clip(np.floor(wanted), low, high)
    rest = budget - int(whole.sum())
    while rest:
        room = (high - whole) if rest > 0 else (whole - low)
        order = np.argsort(-(wanted - whole) if rest > 0 else (wanted - whole), kind="stable")
        order = order[room[order] > 0]
        step = max(1, abs(rest) // order.size)
        for i in order:
            move = min(step, int(room[i]), abs(rest))
            whole[i] += move if rest > 0 else -move
            rest -= move if rest > 0 else -move
            if rest == 0:
                break
    return whole
