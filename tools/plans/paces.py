"""How long the parts of a round took so far, by which the next ones like them are priced. No torch in here."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic

from tools.plans.costs import CURVES, name_curves
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder

Paces = dict[str, float]
"""Seconds by the name of what took them, each the most that was measured: what is read back from disk takes none."""

MEASURING = "measuring a token"


def name_pruning(order: WorkOrder) -> str:
    """What carrying an order out is called: by all that is done inside layers, and the polish."""
    if order.grafted:
        return "grafting"
    if order.cut:
        return "cutting"
    if order.alone:  # which says nothing of what all take
        return "pruning layers alone"
    what = name_pruning_by(layer.recipe for layer in order.layers.values())
    return f"{what}{f'+polish{order.polish}' if order.polish else ''}"


def name_pruning_by(recipes: Iterable[Recipe]) -> str:
    """What pruning layers by these recipes is called."""
    return f"pruning by {' and '.join(dict.fromkeys(recipe.mask_label for recipe in recipes))}"


def name_measuring_curves(recipe: Recipe) -> str:
    """What measuring the curves of a recipe's method is called."""
    return f"measuring {name_curves(recipe)}"


def find_longest_curves(paces: Paces) -> float:
    """Seconds of the curves that take longest, of those known; 0 where none are."""
    return max((seconds for what, seconds in paces.items() if what.startswith(f"measuring {CURVES}")), default=0.0)


@contextmanager
def time_work(paces: Paces, what: str, amount: int = 1) -> Iterator[None]:
    """Note how long each of so many units of work takes inside; of work that breaks nothing is noted."""
    began = monotonic()
    yield
    join_paces(paces, {what: (monotonic() - began) / max(amount, 1)})


def join_paces(paces: Paces, more: Paces) -> Paces:
    """Take more that was measured into `paces`, which are given back."""
    for what, seconds in more.items():
        paces[what] = max(seconds, paces.get(what, 0.0))
    return paces
