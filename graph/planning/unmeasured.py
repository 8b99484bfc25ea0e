"""Trials without figures: of a plan that a person refused, or that broke while it was carried out."""

from typing import Any, Literal

from graph.planning.budget import find_lateness
from graph.planning.orders import describe_plan, hash_request
from graph.planning.verdict import decide_stop
from graph.runs.session import Session
from graph.state import State
from tools.plans.work_order import WorkOrder
from tools.results.trial import Trial

Update = dict[str, Any]


def record_refusal(state: State, order: WorkOrder | None, reason: str, session: Session) -> Update:
    """A person refused the state's plan: the trial is logged, and the loop may end with it.

    `order` is None where the plan could not be carried out anyhow.
    """
    session.emit("approval", iteration=state.iteration, decision="refuse", reason=reason)
    trial = _make_trial(state, order, "refuse", reason, 0.0)
    session.emit("trial", **trial.model_dump())
    stop = decide_stop(state.model_copy(update={"trials": [*state.trials, trial]}))
    stop = stop or find_lateness(state, session.seconds)
    if stop:
        session.emit("note", text=stop)
    return {"trials": [trial], "stop": stop, "seconds": session.seconds}


def record_breakage(state: State, order: WorkOrder | None, reason: str, session: Session) -> Update:
    """The state's plan broke for this reason, before there was an `order` if that is None: the trial is logged."""
    trial = _make_trial(state, order, "rollback", reason, session.elapsed)
    session.emit("trial", **trial.model_dump())
    return {"trials": [trial], "seconds": session.seconds}


def is_unmeasured(state: State) -> bool:
    """Whether the present round has its trial already, before anything was measured."""
    return bool(state.trials) and state.trials[-1].iteration == state.iteration


def leave_unmeasured(state: State) -> Literal["rollback", "plan", "finish"] | None:
    """Where the present round goes without figures: what broke is rolled back; after a refusal the loop plans again, or
    ends. None where it has yet to be measured.
    """
    if not is_unmeasured(state):
        return None
    if state.trials[-1].broken:
        return "rollback"
    return "finish" if state.stop else "plan"


def _make_trial(
    state: State, order: WorkOrder | None, verdict: Literal["rollback", "refuse"], reason: str, seconds: float
) -> Trial:
    """Such a plan among the trials, so that planners and people see it and nobody proposes it again."""
    plan = state.plan
    assert plan is not None, "plan runs first"
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
        hypothesis=plan.hypothesis,
        order="" if order is None else order.id,
        asked=hash_request(plan),
        recipe=None if plan.cut else plan.recipe,
        groups=plan.groups,
        adjustments=plan.adjustments,
        cut=plan.cut,
        seconds=round(seconds, 3),
    )
