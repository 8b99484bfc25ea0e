"""What a plan puts through the model beside the measuring of its trial, in tokens: what a budget has to hold. No torch.

A backward pass counts as two forwards. Each cost has a name, under which it is counted once: what was measured, or
made, before is read back.
"""

import math
from collections.abc import Collection

from tools.base.settings import WorkbenchSettings
from tools.plans.methods import Statistics
from tools.plans.polish import schedule_polish
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder

Costs = dict[str, int]
"""Tokens by the name of what they are for."""


def count_calibration(settings: WorkbenchSettings) -> int:
    """Tokens of the calibration text."""
    return settings.count_all("calibration") * settings.window


def count_gradients(settings: WorkbenchSettings) -> int:
    """Tokens of the part of the calibration text that is also back-propagated."""
    return settings.back_propagated * settings.window


def count_walk(settings: WorkbenchSettings) -> int:
    """Of one walk for KL curves: the gradient windows forward twice, and one backward."""
    return 4 * count_gradients(settings)


def count_profile(settings: WorkbenchSettings) -> int:
    """Of a profile: the calibration text forward once, the gradient windows once more, and two backwards; of several
    texts these once more, for each text walks up by itself."""
    return count_calibration(settings) + (6 if settings.text else 5) * count_gradients(settings)


def count_in_order(kinds: Collection[Statistics], settings: WorkbenchSettings, texts: int = 1) -> int:
    """Of statistics of these kinds behind pruned predecessors: the calibration text forward, block by block.

    Each block is passed once more than statistics are taken of it. A kind that is given twice is taken twice.
    `texts` is as `count_texts` has it.
    """
    passes = sum(kind != "dense" for kind in kinds)
    return (passes + 1) * texts * count_calibration(settings) if passes else 0


def count_cut_forwards(kinds: int) -> int:
    """Of the fit of a cut by which so many kinds of units go: of the dense model, of the cut one for what the layers of
    each kind read, and of what was fitted."""
    return 2 + max(kinds, 1)


def count_cut_fit(settings: WorkbenchSettings, kinds: int = 1) -> int:
    """Of the fit of a cut: so often what it reads of the calibration text through the blocks."""
    return count_cut_forwards(kinds) * settings.count_in_proportion() * settings.window


def count_texts(recipe: Recipe, settings: WorkbenchSettings) -> int:
    """How many texts as long as the run's own a recipe's statistics are of: its questions are one more."""
    return len(recipe.mix) if recipe.mix and settings.mixes_questions else 1


def count_polish(settings: WorkbenchSettings, tokens: int, texts: int = 0) -> int:
    """Of a polish on so many tokens, as `Schedule.count_tokens`; of a mixture of so many `texts`, where it has some.

    Raises ImpossiblePlan where the text is too short.
    """
    windows = settings.calibration_windows * texts if texts else settings.count_fitted()
    schedule = schedule_polish(windows, settings.window, tokens, settings.seed)
    return schedule.count_tokens(settings.window)


def list_curve_costs(recipe: Recipe, settings: WorkbenchSettings) -> Costs:
    """What must be measured before a recipe's allocation is known, and its statistics, beyond the run's own profile."""
    costs = Costs()
    if recipe.mix and settings.mixes_questions:
        costs["profile of the questions"] = count_profile(settings)
    if recipe.needs_curves:
        costs[name_curves(recipe)] = count_texts(recipe, settings) * count_walk(settings)
    return costs


CURVES = "curves of "
"""What the name of any KL curves begins with."""


def name_curves(recipe: Recipe) -> str:
    """What the KL curves of a recipe's method are called: they are the same for any statistics and steps."""
    return f"{CURVES}{recipe.for_curves().mask_label}"


def list_order_costs(order: WorkOrder, settings: WorkbenchSettings) -> Costs:
    """What must be walked through to carry an order out."""
    if order.cut:
        kinds = (order.cut.heads > 0) + (order.cut.neurons > 0)
        return {f"walk of order {order.id}": count_cut_fit(settings, kinds)} if order.cut.refit else {}
    recipes, costs = dict.fromkeys(layer.recipe for layer in order.layers.values()), Costs()
    # as the workbench sums them up
    taken = {(recipe.statistics, recipe.changes_survivors) for recipe in recipes}
    texts = max(count_texts(recipe, settings) for recipe in recipes)
    if walked := count_in_order([kind for kind, _ in taken], settings, texts):
        costs[f"walk of order {order.id}"] = math.ceil(order.passed * walked)
    if order.polish:
        mix = next(iter(order.layers.values())).recipe.mix
        costs[f"polish of order {order.id}"] = count_polish(settings, order.polish, len(mix))
    return costs
