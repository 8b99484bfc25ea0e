"""What a plan puts through the model beside the measuring of its trial, in tokens: what a budget has to hold. No torch.

A backward pass counts as two forwards. Each cost has a name, under which it is counted once: what was measured, or
made, before is read back.
"""

import math
from collections.abc import Collection, Sequence
from itertools import accumulate
from random import Random
from typing import Literal, NamedTuple

from tools.base.errors import ImpossiblePlan
from tools.base.settings import WorkbenchSettings
from tools.plans.methods import Statistics
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder

Means = Literal["fp32", "bf16"]
"""Number format of the two running means that the optimiser of a polish holds of each survivor."""

STEP_TOKENS = 512
"""Tokens whose mean KL one step goes by, in whole windows; one window where that is longer.

Small steps, for there are many of them: after 12,288 tokens, SmolLM2 at 60 % had a validation KL of 0.633 with steps of
512 and 0.684 with steps of 2,048, at the same rate; 0.840 before.
"""

HELD_OUT = 10
"""One window of so many trains nothing, and says when to stop."""

MEASURES = 4
"""How often in a pass the windows held out are measured."""

PATIENCE = 4
"""Measures in a row without a lower KL that end a polish: a pass of them."""


class Schedule(NamedTuple):
    """Windows, by their numbers in the calibration text."""

    steps: Sequence[Sequence[int]]
    """Those of each step."""
    held_out: Sequence[int]
    measured: Sequence[int]
    """Steps done when the windows held out are measured, ascending; they are measured once more before the first."""
    passes: Sequence[int]
    """Steps done at the end of each pass through the text."""

    def on(self, windows: Sequence[int]) -> "Schedule":
        """The same through others: `windows[i]` in place of window i."""
        steps = [[windows[i] for i in step] for step in self.steps]
        return self._replace(steps=steps, held_out=[windows[i] for i in self.held_out])

    @property
    def windows(self) -> list[int]:
        """All that are read, ascending."""
        return sorted({window for step in self.steps for window in step}.union(self.held_out))

    @property
    def trained(self) -> int:
        """Windows that train it, each as often as it does."""
        return sum(map(len, self.steps))

    @property
    def evaluated(self) -> int:
        """Windows held out, each as often as it is measured."""
        return len(self.held_out) * (1 + len(self.measured))

    def count_tokens(self, window: int) -> int:
        """Tokens put through the model, a backward pass as two forwards: the trained windows forward twice, for what
        blocks read is not held, and backward; those held out forward at each measure; all by the dense model once.
        """
        return window * (4 * self.trained + self.evaluated + len(self.windows))


def schedule_polish(windows: int, window: int, tokens: int, seed: int) -> Schedule:
    """The schedule of `tokens` tokens, rounded down to whole windows, through a text of so many windows.

    Every tenth window is held out. More tokens than the others have are several passes, fewer are their first ones;
    each pass has an order of its own, by the seed. Raises ImpossiblePlan where the text is one window, or the tokens
    are less than one.
    """
    if windows < 2:
        raise ImpossiblePlan("polish holds calibration windows out, and there is one; give --calibration-windows 2")
    if tokens < window:
        raise ImpossiblePlan(f"polish on {tokens:,} tokens is less than one window of {window:,}; give it more")
    count = max(1, windows // HELD_OUT)
    held_out = [(2 * i + 1) * windows // (2 * count) for i in range(count)]
    training = [number for number in range(windows) if number not in held_out]
    whole, rest = divmod(tokens // window, len(training))
    parts = [training] * whole + [training[:rest]] * (rest > 0)
    shuffled = [Random(f"polish {seed} {number}").sample(part, len(part)) for number, part in enumerate(parts)]
    passes = [_cut_evenly(part, max(1, STEP_TOKENS // window)) for part in shuffled]
    ends = list(accumulate(map(len, passes)))
    starts = [0, *ends[:-1]]
    measured = [end for start, steps in zip(starts, passes, strict=True) for end in _list_measures(start, len(steps))]
    return Schedule([step for steps in passes for step in steps], held_out, measured, ends)


def _cut_evenly(windows: Sequence[int], most: int) -> list[Sequence[int]]:
    """As few pieces of at most so many windows as can be, and as even."""
    pieces, count = -(-len(windows) // most), len(windows)
    return [windows[count * i // pieces : count * (i + 1) // pieces] for i in range(pieces)]


def _list_measures(start: int, steps: int) -> list[int]:
    """Steps done when a pass of so many is measured; the last of them is its end."""
    times = min(MEASURES, steps)
    return [start + steps * i // times for i in range(1, times + 1)]


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
