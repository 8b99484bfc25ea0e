"""From a plan to exact per-layer sparsities (a tool)."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from pydantic import BaseModel, Field

from tools.curves import Array, LayerProfile, predict_kl, predict_layer_kl
from tools.recipes import Adjustment, Recipe

_GRID = np.linspace(0, 1, 801)
"""Sparsities a layer may take before the last rounding."""


class ImpossiblePlan(ValueError):
    """The plan cannot be met; the message tells the planner why, in one line."""


class Allocation(BaseModel):
    """How many weights of each layer are zero, and what that is predicted to cost."""

    zeros: dict[str, int] = Field(description="Layer name to number of zero weights, in layer order.")
    sparsity: float = Field(description="Share of all prunable weights that are zero.")
    predicted_kl: float = Field(description="Sum of the unweighted KL curves, nats per token.")


def select_layers(selector: str, layers: Sequence[LayerProfile]) -> list[str]:
    """Names of the layers a selector means, in layer order.

    A selector is a glob over layer names (or a bare last name such as `v_proj`), optionally after a range of blocks:
    `*.v_proj`, `blocks 0-3`, `blocks 0-3,29 · *.v_proj`. Raises ImpossiblePlan when it is not of that form or
    means no layer.
    """
    form = re.fullmatch(r"\s*(?:blocks?\s+(?P<blocks>\d[\d\s,-]*))?\s*[·:]?\s*(?P<glob>\S*)\s*", selector)
    if form is None or not (form["blocks"] or form["glob"]):
        raise ImpossiblePlan(f"selector {selector[:80]!r} is not a glob such as '*.v_proj' or 'blocks 0-3 · *.v_proj'")
    blocks = _parse_blocks(form["blocks"]) if form["blocks"] else None
    glob = form["glob"] or "*"
    names = [
        layer.name
        for layer in layers
        if (blocks is None or any(layer.block in part for part in blocks))
        and any(fnmatchcase(text, glob) for text in (layer.name, layer.kind, layer.name.rsplit(".", 1)[-1]))
    ]
    if not names:
        raise ImpossiblePlan(f"selector {selector[:80]!r} means no layer; layers are named like {layers[0].name!r}")
    return names


def _parse_blocks(text: str) -> list[range]:
    blocks = []
    for part in re.split(r"[,\s]+", text.strip(" ,")):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if ends is None:
            raise ImpossiblePlan(f"{part!r} is not a range of blocks such as 0-3")
        blocks.append(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return blocks


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

    Minimises sum_l w_l kappa_l(s_l) at the budget and within bounds by bisection on the multiplier of the budget
    (the problem is separable), or takes the same sparsity everywhere; `recipe.strength` mixes the two. Raises
    ImpossiblePlan when bounds and protected layers cannot meet the budget.
    """
    sizes = np.array([layer.weights for layer in layers], dtype=np.float64)
    weights, low, high = _gather_bounds(layers, adjustments, protect, max_layer_sparsity)
    budget = round(sparsity * sizes.sum())
    least, most = np.floor(low * sizes + 1e-6), np.ceil(high * sizes - 1e-6)  # bounds hold to the whole weight
    _refuse_impossible(budget, sizes.sum(), least.sum(), most.sum())
    low, high = least / sizes, most / sizes
    shares = _spread_evenly(sizes, budget, low, high)
    if recipe.allocation == "kappa":
        curves = np.stack([predict_layer_kl(layer, _GRID) for layer in layers]) * weights[:, None]
        cheapest = _minimise_kl(curves, sizes, budget, low, high)
        if _total_kl(curves, cheapest) < _total_kl(curves, shares):  # a curve that bends down can mislead the search
            shares += recipe.strength * (cheapest - shares)
    zeros = _round_to_budget(shares * sizes, budget, least, most)
    return Allocation(
        zeros={layer.name: int(z) for layer, z in zip(layers, zeros, strict=True)},
        sparsity=float(zeros.sum() / sizes.sum()),
        predicted_kl=predict_kl(layers, zeros / sizes),
    )


def _gather_bounds(
    layers: Sequence[LayerProfile], adjustments: Sequence[Adjustment], protect: Sequence[str], most: float
) -> tuple[Array, Array, Array]:
    """(factor, least, greatest sparsity) per layer; exact zeros of the dense weights are a lower bound."""
    index = {layer.name: i for i, layer in enumerate(layers)}
    dense = np.array([layer.zeros / layer.weights for layer in layers])
    factor, low, high = np.ones(len(layers)), dense.copy(), np.full(len(layers), most)
    for adjustment in adjustments:
        chosen = [index[name] for name in select_layers(adjustment.selector, layers)]
        if adjustment.action == "factor":
            factor[chosen] *= adjustment.factor or 1.0
        elif adjustment.action == "bounds":
            low[chosen] = np.maximum(low[chosen], adjustment.low or 0.0)
            high[chosen] = np.minimum(high[chosen], 1.0 if adjustment.high is None else adjustment.high)
            for i in chosen:
                if low[i] > max(high[i], dense[i]):
                    raise ImpossiblePlan(
                        f"{adjustment.selector!r}: the least sparsity asked of {layers[i].name}, {low[i]:g}, is above "
                        f"the greatest, {high[i]:g}"
                    )
    guarded = [*protect, *(a.selector for a in adjustments if a.action == "protect")]
    untouched = [index[name] for selector in guarded for name in select_layers(selector, layers)]
    high = np.maximum(high, dense)
    low[untouched] = high[untouched] = dense[untouched]
    return factor, low, high


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


def _spread_evenly(sizes: Array, budget: int, low: Array, high: Array) -> Array:
    """The same sparsity everywhere that bounds allow."""
    least, most = 0.0, 1.0
    for _ in range(60):
        middle = (least + most) / 2
        if (np.clip(middle, low, high) * sizes).sum() > budget:
            most = middle
        else:
            least = middle
    even: Array = np.clip(least, low, high)
    return even


def _minimise_kl(curves: Array, sizes: Array, budget: int, low: Array, high: Array) -> Array:
    """Sparsities minimising the sum of `curves` (layers x _GRID) at the budget."""
    allowed = (_GRID >= low[:, None]) & (_GRID <= high[:, None])
    curves = np.where(allowed, curves, np.inf)

    def choose(log_price: float) -> Array:
        cost = curves - np.exp(log_price) * sizes[:, None] * _GRID
        best = _GRID[np.argmin(cost, axis=1)]
        chosen: Array = np.clip(np.where(allowed.any(axis=1), best, low), low, high)  # bounds closer than the grid
        return chosen

    cheap, dear = -80.0, 40.0
    for _ in range(100):
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
