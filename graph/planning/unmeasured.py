"""Trials without figures: of a plan that a person refused, or that broke while it was carried out."""

from typing import Literal

from graph.planning.orders import describe_plan, hash_request
from graph.planning.plan import Plan
from graph.state import State, Trial
from tools.plans.work_order import WorkOrder


def record_unmeasured(
    state: State,
    plan: Plan,
    order: WorkOrder | None,
    verdict: Literal["rollback", "refuse"],
    reason: str,
    *,
    seconds: float = 0.0,
) -> Trial:
    """Such a plan among the trials, so that planners and people see it and nobody proposes it again.

    `order` is None where the plan broke before there was one. What is rolled back broke, for the `reason` given.
    """
    return Trial(
        iteration=state.iteration,
        checkpoint=state.accepted,
        sparsity=plan.sparsity if order is None else order.sparsity,
        perplexity=None,
        kl=None,
        predicted_kl=0.0 if order is None else order.predicted_kl,
        verdict=verdict,
        broken=verdict == "rollback",
        reason=" ".join(reason.split()),
        plan=describe_plan(plan),
        order="" if order is None else order.id,
        asked=hash_request(plan),
        recipe=plan.recipe,
        seconds=round(seconds, 3),
    )


def is_unmeasured(state: State) -> bool:
    """Whether the present round has its trial already, before anything was measured."""
    return bool(state.trials) and state.trials[-1].iteration == state.iteration
