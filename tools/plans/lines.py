"""What is asked for in one line, such as `45.0% two-sided+refit:kappa · *.v_proj x2`."""

from collections.abc import Sequence
from typing import Protocol

from tools.base.words import shorten
from tools.plans.cuts import Cutting, describe_cutting
from tools.plans.groups import Group, describe_group
from tools.plans.recipe import Adjustment, Recipe

MOST_NAMED = 4
"""Groups, and adjustments, that a line names; of others it says how many."""


class Levers(Protocol):
    """A planner's plan, or a draft of one."""

    sparsity: float
    recipe: Recipe

    @property
    def groups(self) -> Sequence[Group]: ...
    @property
    def adjustments(self) -> Sequence[Adjustment]: ...
    @property
    def cut(self) -> Cutting | None: ...


def describe_levers(plan: Levers) -> str:
    """The line. Groups stand behind the recipe: `45.0% refit:kappa · wanda in *.v_proj`."""
    if plan.cut:
        return f"{plan.sparsity:.1%} {describe_cutting(plan.cut)}"
    line = f"{plan.sparsity:.1%} {plan.recipe.label}"
    for told in (
        [describe_group(group, plan.recipe) for group in plan.groups],
        [_describe_adjustment(adjustment) for adjustment in plan.adjustments],
    ):
        left_out = len(told) - MOST_NAMED
        shown = [*told[:MOST_NAMED], *([f"{left_out} more"] if left_out > 0 else [])]
        line = f"{line} · {', '.join(shown)}" if shown else line
    return line


def _describe_adjustment(adjustment: Adjustment) -> str:
    selector = shorten(" ".join(adjustment.selector.split()), 40)
    if adjustment.action == "factor":
        return f"{selector} x{adjustment.factor:g}"
    if adjustment.action == "protect":
        return f"{selector} protected"
    low, high = adjustment.low, adjustment.high
    if low is None:
        return f"{selector} ≤{100 * (high or 0):.3g}%"
    return f"{selector} ≥{100 * low:.3g}%" if high is None else f"{selector} {100 * low:.3g}–{100 * high:.3g}%"
