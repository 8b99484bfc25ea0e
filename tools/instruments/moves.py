"""What a search moves: factors on the KL curves of groups of layers, and the numbers of a recipe."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from tools.base.errors import ImpossiblePlan
from tools.instruments.functions import Draft
from tools.plans.methods import METHODS, MOST_DAMPING, MOST_STEPS
from tools.plans.recipe import LEAST_FACTOR, MOST_FACTOR, Adjustment, Recipe

LeverName = Literal["strength", "damping", "refit_steps"]

FIRST_DAMPING = 0.1
"""Where a search goes from none at all, which no multiple of leads anywhere."""


class Lever(NamedTuple):
    """A number of a recipe."""

    low: float
    high: float
    digits: int
    """Behind the point, as far as it counts."""
    counts: Callable[[Recipe], bool]
    """Whether it changes anything of a recipe."""
    otherwise: str
    """Why it does not where it does not."""


LEVERS: Mapping[str, Lever] = {
    "strength": Lever(0, 1, 4, lambda recipe: bool(recipe.needs), "the allocation shares nothing out"),
    "damping": Lever(0, MOST_DAMPING, 3, lambda recipe: recipe.refits, "its survivors are not fitted"),
    "refit_steps": Lever(
        *(1, MOST_STEPS, 0),
        lambda recipe: METHODS[recipe.method].refits_in_steps,
        "no mask grows in steps but refit's",
    ),
}

Point = Mapping[str, float]
"""Where a search stands: what differs from the plan that it began with, factors by selector and levers by name."""


def move(draft: Draft, point: Point, name: str, by: float) -> Point | None:
    """The point with one factor or lever `by` times what it is; None where that is the same, or a factor that may not
    be: levers stop at their bounds."""
    start, lever = _find_start(draft, name), LEVERS.get(name)
    now = point.get(name, start)
    value = now * by
    if name == "damping" and not now and by > 1:
        value = FIRST_DAMPING
    if lever:
        value = round(min(max(value, lever.low), lever.high), lever.digits)
    elif not LEAST_FACTOR <= value <= MOST_FACTOR:
        return None
    else:
        value = round(value, 4)
    if value == now:
        return None
    others = {other: x for other, x in point.items() if other != name}
    return others if value == start else {**others, name: value}


def _find_start(draft: Draft, name: str) -> float:
    return float(getattr(draft.recipe, name)) if name in LEVERS else 1.0


def go_to(draft: Draft, point: Point) -> Draft:
    """The plan at a point."""
    levers = {name: x if LEVERS[name].digits else int(x) for name, x in point.items() if name in LEVERS}
    factors = {name: factor for name, factor in point.items() if name not in LEVERS}
    more = [Adjustment(selector=name, action="factor", factor=factor) for name, factor in factors.items()]
    return draft.model_copy(
        update={
            "recipe": draft.recipe.model_copy(update=levers),
            "adjustments": [*draft.adjustments, *more],
        }
    )


def refuse_idle_lever(draft: Draft, name: str) -> None:
    """Raises ImpossiblePlan for a lever that changes nothing of the plan."""
    lever = LEVERS[name]
    if not lever.counts(draft.recipe):
        raise ImpossiblePlan(f"{name} changes nothing of {draft.recipe.label}: {lever.otherwise}; search without it")
    if all(move(draft, {}, name, by) is None for by in (2.0, 0.5)):
        raise ImpossiblePlan(f"{name} of {draft.recipe.label} cannot be moved from where it is; give it another value")


def describe_point(point: Point) -> str:
    """`*.v_proj x 1.4, damping 0.2`."""
    told = [f"{name} {value:g}" if name in LEVERS else f"{name} x {value:g}" for name, value in point.items()]
    return ", ".join(told) or "as it was"
