"""What a search moves: factors on the KL curves of groups of layers, and the numbers of a recipe."""

from collections.abc import Callable, Mapping
from typing import Literal

from tools.base.errors import ImpossiblePlan
from tools.instruments.functions import Draft
from tools.plans.methods import METHODS, MOST_DAMPING, MOST_STEPS
from tools.plans.recipe import LEAST_FACTOR, MOST_FACTOR, Adjustment, Recipe

LeverName = Literal["strength", "damping", "refit_steps"]

FIRST_DAMPING = 0.1
"""Where a search goes from none at all, which no multiple of leads anywhere."""

BOUNDS: Mapping[str, tuple[float, float]] = {
    "strength": (0, 1),
    "damping": (0, MOST_DAMPING),
    "refit_steps": (1, MOST_STEPS),
}

USES: Mapping[str, tuple[Callable[[Recipe], bool], str]] = {
    "strength": (lambda recipe: bool(recipe.needs), "the allocation shares nothing out"),
    "damping": (lambda recipe: recipe.refits, "its survivors are not fitted"),
    "refit_steps": (lambda recipe: METHODS[recipe.method].refits_in_steps, "no mask grows in steps but refit's"),
}
"""Of each lever which recipes it changes anything of, and why of no other."""

Point = Mapping[str, float]
"""Where a search stands: what differs from the plan that it began with, factors by selector and levers by name."""


def find_now(draft: Draft, point: Point, name: str) -> float:
    """What a factor or a lever is at a point."""
    return point.get(name, _find_start(draft, name))


def _find_start(draft: Draft, name: str) -> float:
    return float(getattr(draft.recipe, name)) if name in BOUNDS else 1.0


def move(draft: Draft, point: Point, name: str, by: float) -> Point | None:
    """The point with one factor or lever `by` times what it is, within its bounds, whole where only whole numbers
    count; None where that is the same."""
    now = find_now(draft, point, name)
    low, high = BOUNDS.get(name, (LEAST_FACTOR, MOST_FACTOR))
    if name not in BOUNDS and not low <= now * by <= high:
        return None
    value = min(max(now * by, low), high)
    if name == "damping":
        value = round(FIRST_DAMPING if not now and by > 1 else value, 3)
    elif name == "refit_steps":
        value = float(round(value))
    else:
        value = round(value, 4)
    moved = {**point, name: value}
    return None if value == now else {key: x for key, x in moved.items() if x != _find_start(draft, key)}


def go_to(draft: Draft, point: Point) -> Draft:
    """The plan at a point."""
    levers = {name: int(x) if name == "refit_steps" else x for name, x in point.items() if name in BOUNDS}
    factors = {name: factor for name, factor in point.items() if name not in BOUNDS}
    more = [Adjustment(selector=name, action="factor", factor=factor) for name, factor in factors.items()]
    return draft.model_copy(
        update={
            "recipe": draft.recipe.model_copy(update=levers),
            "adjustments": [*draft.adjustments, *more],
        }
    )


def refuse_idle_lever(draft: Draft, name: str) -> None:
    """Raises ImpossiblePlan for a lever that changes nothing of the plan."""
    used, why = USES[name]
    if not used(draft.recipe):
        raise ImpossiblePlan(f"{name} changes nothing of {draft.recipe.label}: {why}; search without it")


def describe_point(point: Point) -> str:
    """`*.v_proj x 1.4, damping 0.2`."""
    told = [f"{name} {value:g}" if name in BOUNDS else f"{name} x {value:g}" for name, value in point.items()]
    return ", ".join(told) or "as it was"
