"""A number of zeros to be shared out over layers: what every allocation is given, and how it is met exactly.

Shape suffix: L layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tools.plans.layer_profile import Array, LayerProfile

SAME_SPARSITY = 5e-4
"""Two sparsities nearer than this are the same budget: the promise is the target within 0.05 %."""


def same_sparsity(one: float, other: float) -> bool:
    """Whether two sparsities are the same budget."""
    return abs(one - other) <= SAME_SPARSITY


class Budget(NamedTuple):
    """What is to be shared out, and within which bounds."""

    layers: Sequence[LayerProfile]
    weights_L: Array
    zeros: int
    """Of all layers together."""
    low_L: Array
    high_L: Array
    """The least and the greatest sparsity of each layer."""
    factors: Sequence[tuple[Sequence[int], float]] = ()
    """(places of layers, how many times as much as predicted their KL counts), one after another."""


def meet_budget(budget: Budget, shares_at: Callable[[float], Array], end: float) -> Array:
    """`shares_at` of a number from 0 to `end`, clipped to the bounds, found by bisection so that the budget is met."""
    least, most = 0.0, end
    for _ in range(60):
        middle = (least + most) / 2
        if (np.clip(shares_at(middle), budget.low_L, budget.high_L) * budget.weights_L).sum() > budget.zeros:
            most = middle
        else:
            least = middle
    shares_L: Array = np.clip(shares_at(least), budget.low_L, budget.high_L)
    return shares_L


def blend_to_budget(budget: Budget, stages: Sequence[Array]) -> Array:
    """The point on the path through ever sparser `stages` whose weighted sum is the budget."""
    totals = [float((stage_L * budget.weights_L).sum()) for stage_L in stages]
    for before_L, after_L, start, end in zip(stages, stages[1:], totals, totals[1:], strict=False):
        if start <= budget.zeros <= end:
            share = (budget.zeros - start) / (end - start) if end > start else 0.0
            return before_L + share * (after_L - before_L)
    return stages[0] if budget.zeros < totals[0] else stages[-1]


def round_to_budget(wanted_L: Array, zeros: int, least_L: Array, most_L: Array) -> Array:
    """Whole numbers that sum to `zeros`, each as near to `wanted_L` as the bounds allow."""
    whole_L = np.clip(np.floor(wanted_L), least_L, most_L)
    rest = zeros - int(whole_L.sum())
    while rest:
        room_L = (most_L - whole_L) if rest > 0 else (whole_L - least_L)
        order = np.argsort(-(wanted_L - whole_L) if rest > 0 else (wanted_L - whole_L), kind="stable")
        order = order[room_L[order] > 0]
        step = max(1, abs(rest) // order.size)
        for i in order:
            move = min(step, int(room_L[i]), abs(rest))
            whole_L[i] += move if rest > 0 else -move
            rest -= move if rest > 0 else -move
            if rest == 0:
                break
    return whole_L
