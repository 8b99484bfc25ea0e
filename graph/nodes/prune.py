"""prune: carry the plan's work order out, from the dense weights, and write the checkpoint."""

from functools import partial
from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.approval import Settled, ask, examine_edit, settle_plan
from graph.planning.budget import charge
from graph.planning.orders import record_plan
from graph.planning.verdict import leave_unmeasured, record_breakage, record_refusal
from graph.runs.replay import find_breakage, find_refusal
from graph.runs.session import Session, enter, open_bench, tell_layers
from graph.state import State
from tools.base.errors import BrokenPlan, ImpossiblePlan, UserError


class Refused(Exception):
    """A person will not have the plan, for the reason given."""


def prune(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Prune by the order; layers that were made before by the same recipe are read back.

    A plan that was edited since it was made is first examined as a planner's is, and logged; where it cannot be carried
    out, a person is asked. A plan that breaks is a trial without figures, which is rolled back.
    """
    session = enter("prune", state, runtime)
    settled: Settled | None = None
    charged: dict[str, Any] = {}
    try:
        settled = find_settled(state, session)
        charged = charge(state, settled.plan, settled.order)
        if settled.edited:
            session.emit("plan", iteration=state.iteration, planner="you", **record_plan(settled.plan, settled.order))
            state = state.model_copy(update={"plan": settled.plan})
        if state.replay and (reason := find_breakage(state.replay, state.iteration)):
            raise BrokenPlan(reason)
        with open_bench(state, session) as bench:
            checkpoint = bench.pruner.prune(state.profile, settled.order, session.progress)
            tell_layers(session, bench, checkpoint)
    except Refused as refused:
        return record_refusal(state, None, str(refused), session)
    except ImpossiblePlan as error:
        return charged | record_breakage(state, settled and settled.order, str(error), session)
    return charged | {"plan": settled.plan, "order": settled.kept, "current": checkpoint, "seconds": session.seconds}


def find_settled(state: State, session: Session) -> Settled:
    """The plan to carry out: the state's, or what a person says instead. Raises Refused and BrokenPlan."""
    if state.replay and (reason := find_refusal(state.replay, state.iteration)):
        raise Refused(reason)
    try:
        return settle_plan(state, session)
    except (UserError, BrokenPlan):
        raise
    except ValueError as error:
        answer, settled = ask(state, None, partial(examine_edit, state=state, session=session), str(error))
    if settled is None:
        raise Refused(answer.reason)
    session.emit("approval", iteration=state.iteration, decision=answer.decision, reason=answer.reason)
    return settled


def after_prune(state: State) -> Literal["validate", "rollback", "plan", "finish"]:
    """Measure what was made, and roll back what broke; plan again, or finish, after a refusal."""
    return leave_unmeasured(state) or "validate"
