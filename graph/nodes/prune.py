"""prune: carry the plan's work order out, from the dense weights, and write the checkpoint."""

from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.orders import find_order
from graph.planning.unmeasured import is_unmeasured, record_unmeasured
from graph.runs.replay import find_breakage
from graph.runs.session import enter, open_bench, tell_layers
from graph.state import State
from tools.base.errors import BrokenPlan, ImpossiblePlan
from tools.plans.work_order import WorkOrder


def prune(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Prune by the order; layers that were made before by the same recipe are read back.

    A plan that breaks at that is a trial without figures, which is rolled back.
    """
    assert state.plan is not None, "plan runs first"
    session = enter("prune", state, runtime)
    order: WorkOrder | None = None
    try:
        with open_bench(state, session) as bench:
            order = find_order(bench, state, session.progress)
            if state.replay and (reason := find_breakage(state.replay, state.iteration)):
                raise BrokenPlan(reason)
            checkpoint = bench.prune(state.profile, order, session.progress)
            tell_layers(session, bench, checkpoint)
    except ImpossiblePlan as error:
        trial = record_unmeasured(state, state.plan, order, "rollback", str(error), seconds=session.elapsed)
        session.emit("trial", **trial.model_dump())
        return {"trials": [trial], "seconds": session.seconds}
    return {"current": checkpoint, "seconds": session.seconds}


def after_prune(state: State) -> Literal["validate", "rollback"]:
    """Measure what was made; roll back what broke."""
    return "rollback" if is_unmeasured(state) else "validate"
