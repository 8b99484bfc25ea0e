"""approve: a person sees the plan and what it is predicted to do, and accepts, edits or refuses it.

The node interrupts the graph; whoever runs it brings the answer. In the terminal that is one line; in Studio a form,
made from the schema that comes with the question. An answer that cannot be used is asked for again, with the reason.
"""

from functools import partial
from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.approval import Answer, Settled, ask, examine_edit, settle_plan
from graph.planning.orders import record_plan
from graph.planning.verdict import leave_unmeasured, record_breakage, record_refusal
from graph.runs.replay import find_decision
from graph.runs.session import enter
from graph.state import State
from tools.base.errors import BrokenPlan, UserError


def approve(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Have a person accept, edit or refuse the plan; a refusal counts as an iteration."""
    session = enter("approve", state, runtime)
    settled: Settled | None = None
    problem = ""
    try:
        settled = settle_plan(state, session)
    except UserError:
        raise
    except BrokenPlan as error:
        return record_breakage(state, None, str(error), session)
    except ValueError as error:  # of an edited plan
        problem = str(error)
    if state.replay:
        answer = Answer(**find_decision(state.replay, state.iteration))
    else:
        answer, settled = ask(state, settled, partial(examine_edit, state=state, session=session), problem)
    if answer.decision == "refuse" or settled is None:
        return record_refusal(state, settled and settled.order, answer.reason or problem, session)
    session.emit("approval", iteration=state.iteration, decision=answer.decision, reason=answer.reason)
    if settled.edited:
        session.emit("plan", iteration=state.iteration, planner="you", **record_plan(settled.plan, settled.order))
    return {"plan": settled.plan, "order": settled.kept, "seconds": session.seconds}


def after_approve(state: State) -> Literal["prune", "rollback", "plan", "finish"]:
    """Prune what was approved; plan again, or finish, after a refusal. What broke before it is rolled back."""
    return leave_unmeasured(state) or "prune"
