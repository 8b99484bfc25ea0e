"""What a plan comes to: its recipe under the user's pattern, its exact allocation, and its one line for people."""

from collections.abc import Sequence

import numpy as np

from graph.config import RunConfig
from graph.planning.plan import Plan
from graph.reflecting.posterior import find_multipliers, weigh_layers
from graph.reflecting.schema import Lesson
from tools.plans.allocate import Allocation, allocate
from tools.plans.layer_profile import LayerProfile, predict_kl
from tools.plans.recipe import Adjustment, Recipe

LESSONS = " · lessons x"
"""What parts a plan's line from how many groups of layers it weighs as lessons say."""


def find_recipe(plan: Plan, config: RunConfig) -> Recipe:
    """The plan's recipe with the user's pattern, whatever the plan says of one."""
    return plan.recipe.model_copy(update={"pattern": config.pattern})


def refuse_above_target(plan: Plan, config: RunConfig) -> None:
    """Raises ValueError with a reason for whoever made the plan."""
    if plan.sparsity > config.target_sparsity + 1e-9:
        raise ValueError(f"sparsity {plan.sparsity:g} is above the target; plan at most {config.target_sparsity:g}")


def apply_lessons(plan: Plan, lessons: Sequence[Lesson], layers: Sequence[LayerProfile], config: RunConfig) -> Plan:
    """The plan with what lessons say of the KL curves, whatever it said of them; they weigh only where curves are read.

    Every plan goes through here once, whoever made it, before anything is predicted or pruned by it.
    """
    recipe = find_recipe(plan, config)
    multipliers = find_multipliers(lessons, layers, recipe) if recipe.reads_curves else {}
    return plan.model_copy(update={"multipliers": multipliers})


def allocate_plan(layers: Sequence[LayerProfile], plan: Plan, config: RunConfig) -> Allocation:
    """The plan's exact share for every layer, within the config's bounds. Raises ImpossiblePlan.

    Lessons multiply the KL curves first, and the plan's own factors come on top. The predicted KL is that of the
    curves as they are.
    """
    shared = allocate(
        weigh_layers(layers, plan.multipliers),
        plan.sparsity,
        find_recipe(plan, config),
        plan.adjustments,
        protect=config.protect,
        max_layer_sparsity=config.max_layer_sparsity,
    )
    sparsity = np.array([shared.zeros[layer.name] / layer.weights for layer in layers])
    return shared.model_copy(update={"predicted_kl": predict_kl(layers, sparsity)})


def describe_plan(plan: Plan) -> str:
    """A plan in one line for people, such as `45.0% two-sided+refit:kappa · *.v_proj x2 · lessons x3 (0.80–1.41)`.

    The last part says for how many groups of layers lessons multiply the KL curves, and from what to what.
    """
    line = f"{plan.sparsity:.1%} {plan.recipe.label}"
    shown = [_describe_adjustment(adjustment) for adjustment in plan.adjustments[:4]]
    if len(plan.adjustments) > len(shown):
        shown.append(f"{len(plan.adjustments) - len(shown)} more")
    line = f"{line} · {', '.join(shown)}" if shown else line
    if not plan.multipliers:
        return line
    factors = plan.multipliers.values()
    low, high = f"{min(factors):.2f}", f"{max(factors):.2f}"
    return f"{line}{LESSONS}{len(factors)} ({low if low == high else f'{low}–{high}'})"


def drop_lessons(line: str) -> str:
    """A plan's line without what it says of lessons."""
    return line.partition(LESSONS)[0]


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


def group_kl(group: Sequence[LayerProfile], sparsity: dict[str, float]) -> float:
    """Predicted KL of a group of layers at these sparsities, nats per token."""
    return predict_kl(group, np.array([sparsity[layer.name] for layer in group]))
