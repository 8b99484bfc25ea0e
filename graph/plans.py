"""What a plan comes to: its recipe under the user's pattern, its exact allocation, and its one line for people."""

from collections.abc import Sequence

from graph.config import RunConfig
from graph.state import Plan
from tools.allocate import Allocation, allocate
from tools.curves import LayerProfile
from tools.recipes import Adjustment, Recipe


def find_recipe(plan: Plan, config: RunConfig) -> Recipe:
    """The plan's recipe with the user's pattern, whatever the plan says of one."""
    return plan.recipe.model_copy(update={"pattern": config.pattern})


def allocate_plan(layers: Sequence[LayerProfile], plan: Plan, config: RunConfig) -> Allocation:
    """The plan's exact share for every layer, within the config's bounds. Raises ImpossiblePlan."""
    return allocate(
        layers,
        plan.sparsity,
        find_recipe(plan, config),
        plan.adjustments,
        protect=config.protect,
        max_layer_sparsity=config.max_layer_sparsity,
    )


def describe_plan(plan: Plan) -> str:
    """A plan in one line for people, such as `45.0% two-sided+refit:kappa · *.v_proj x2`."""
    line = f"{plan.sparsity:.1%} {plan.recipe.label}"
    shown = [_describe_adjustment(adjustment) for adjustment in plan.adjustments[:4]]
    if len(plan.adjustments) > len(shown):
        shown.append(f"{len(plan.adjustments) - len(shown)} more")
    return f"{line} · {', '.join(shown)}" if shown else line


def _describe_adjustment(adjustment: Adjustment) -> str:
    selector = " ".join(adjustment.selector.split())
    selector = selector if len(selector) <= 40 else selector[:39] + "…"
    if adjustment.action == "factor":
        return f"{selector} x{adjustment.factor:g}"
    if adjustment.action == "protect":
        return f"{selector} protected"
    low, high = adjustment.low, adjustment.high
    if low is None:
        return f"{selector} ≤{100 * (high or 0):.3g}%"
    return f"{selector} ≥{100 * low:.3g}%" if high is None else f"{selector} {100 * low:.3g}–{100 * high:.3g}%"
