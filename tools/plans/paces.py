"""How long the parts of a round took so far, by which the next ones like them are priced. No torch in here."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic

from tools.plans.costs import CURVES, name_curves
from tools.plans.methods import LEVERS, METHODS, PROFILED, REFIT_STEPS
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder

Paces = dict[str, float]
"""Seconds by the name of what took them, each the most that was measured: what is read back from disk takes none."""

MEASURING = "measuring a token"


def name_pruning(order: WorkOrder) -> str:
    """What carrying an order out is called: by all that is done inside layers, and the polish."""
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


def split_work(recipe: Recipe) -> list[Recipe]:
    """Recipes by the dense model's statistics whose seconds add up to those of one, about: choosing a mask takes as
    long by any score, correcting survivors by any mask, and so does the fit that follows."""
    method, plain = METHODS[recipe.method], {"statistics": "dense", "pattern": recipe.pattern}
    if method.refits_in_steps or not method.lever:
        return [Recipe(method=recipe.method, refit=recipe.refits, **plain)]
    corrected = [Recipe(method="sparsegpt", refit=False, **plain)] if method.changes_survivors else []
    if corrected and not recipe.refits_after:
        return corrected
    return [*corrected, Recipe(method=PROFILED, refit=recipe.refits_after, **plain)]


def list_works(pattern: str) -> list[Recipe]:
    """Every recipe that `split_work` makes of what planners may ask for."""
    asked = [Recipe(method=name, refit=refit, pattern=pattern) for name in LEVERS for refit in (False, True)]
    works = [part for recipe in asked for part in split_work(recipe)]
    return list(dict.fromkeys(works))


def expect_pruning(recipe: Recipe, paces: Paces) -> float:
    """Seconds of pruning all layers by a recipe: as known, or those of what it is made of; 0 of what nobody knows.

    A fit in steps takes as long as it has steps.
    """
    known = paces.get(name_pruning_by([recipe]))
    parts = sum(paces.get(name_pruning_by([part]), 0.0) for part in split_work(recipe))
    return parts * recipe.steps / REFIT_STEPS if known is None else known


def expect_curves(recipe: Recipe, paces: Paces, walk: float) -> float:
    """Seconds of measuring the curves of a recipe's method: likewise, and those of the `walk` at least."""
    known = paces.get(name_measuring_curves(recipe))
    parts = sum(paces.get(name_measuring_curves(part), 0.0) for part in split_work(recipe))
    return max(parts, walk) if known is None else known


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
