"""approve: a person sees the plan and what it is predicted to do, and accepts, edits or refuses it.

The node interrupts the graph; whoever runs it brings the answer. In the terminal that is one line; in Studio a form,
made from the schema that comes with the question. An answer that cannot be used is asked for again, with the reason.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from langgraph.runtime import Runtime
from langgraph.types import interrupt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graph.config import RunConfig
from graph.planning.orders import (
    find_order,
    keep_order,
    measure_with,
    record_plan,
    refuse_above_target,
)
from graph.planning.plan import Plan
from graph.planning.situation import gather_situation
from graph.planning.unmeasured import is_unmeasured, record_unmeasured
from graph.planning.verdict import decide_stop
from graph.runs.replay import find_decision
from graph.runs.session import Session, enter, open_bench
from graph.state import State
from tools.base.errors import UserError
from tools.plans.work_order import WorkOrder

ACCEPT = ("accept", "a", "yes", "y")
REFUSE = ("refuse", "r", "no", "n")


class Answer(BaseModel):
    """What a person says to a plan."""

    model_config = ConfigDict(extra="forbid")

    decision: Literal["accept", "edit", "refuse"] = Field(
        description="accept: carry the plan out. edit: carry out the plan given here. refuse: have another one made."
    )
    plan: Plan | None = Field(None, description="For edit: the plan to carry out; what is left out stays as planned.")
    reason: str = Field("", max_length=500, description="For refuse: why, in a few words; the planner is told.")


def approve(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Have a person accept, edit or refuse the plan; a refusal counts as an iteration."""
    assert state.plan is not None, "plan runs first"
    session = enter("approve", state, runtime)
    with open_bench(state, session) as bench:
        order = find_order(bench, state, session.progress)
    if state.replay:
        answer, edited = Answer(**find_decision(state.replay, state.iteration)), None
    else:
        answer, edited = ask(state.plan, order, state.iteration, partial(resolve_edit, state=state, session=session))
    session.emit("approval", iteration=state.iteration, decision=answer.decision, reason=answer.reason)
    if answer.decision == "refuse":
        trial = record_unmeasured(state, state.plan, order, "refuse", answer.reason)
        session.emit("trial", **trial.model_dump())
        stop = decide_stop(state.model_copy(update={"trials": [*state.trials, trial]}))
        if stop:
            session.emit("note", text=stop)
        return {"trials": [trial], "stop": stop, "seconds": session.seconds}
    if edited is None:
        return {"plan": state.plan, "seconds": session.seconds}
    session.emit("plan", iteration=state.iteration, planner="you", **record_plan(edited.plan, edited.order))
    return {"plan": edited.plan, "order": edited.kept, "seconds": session.seconds}


class Edited(NamedTuple):
    """A plan as a person changed it."""

    plan: Plan
    order: WorkOrder
    kept: str
    """Hash of the order's artifact."""


def ask(
    plan: Plan, order: WorkOrder, iteration: int, resolve: Callable[[Plan], Edited]
) -> tuple[Answer, Edited | None]:
    """Interrupt until there is an answer that can be carried out; with it, what it edits.

    `resolve` raises ValueError for an edited plan that cannot be carried out.
    """
    question = {
        "iteration": iteration,
        "plan": plan.model_dump(exclude={"multipliers"}),
        "line": order.line,
        "reason": plan.reason,
        "predicted_kl": order.predicted_kl,
        "problem": "",
    }
    while True:
        given = interrupt(question, response_schema=Answer.model_json_schema())
        try:
            answer = read_answer(given, plan)
            return answer, resolve(answer.plan) if answer.plan else None
        except UserError:  # a full disk, say: nothing that another answer could do better
            raise
        except ValueError as error:
            question = question | {"problem": str(error)}


def read_answer(given: Any, plan: Plan) -> Answer:
    """An answer from a form (an object) or a terminal (a line). Raises ValueError with what to say instead."""
    if isinstance(given, str):
        given = _read_line(given.strip())
    if not isinstance(given, dict):
        raise ValueError("answer with an object that holds a decision")
    given = {name: value for name, value in given.items() if value is not None}
    changes = given.pop("plan", None)
    if isinstance(changes, str):
        changes = _read_json(changes)
    try:
        answer = Answer.model_validate(given)
        if answer.decision == "edit":
            if not isinstance(changes, dict):
                raise ValueError("to edit, give the plan, or those of its fields that change")
            answer.plan = Plan.model_validate(_merge(plan, changes))
    except ValidationError as error:
        raise ValueError("; ".join(_describe(problem) for problem in error.errors()[:3])) from error
    if answer.decision == "refuse" and not answer.reason.strip():
        raise ValueError("say why it is refused, in a few words: the planner is told")
    return answer


def _read_line(line: str) -> dict[str, Any]:
    word, _, rest = line.partition(" ")
    if line.startswith("{"):
        return {"decision": "edit", "plan": line}
    if line.lower() in ACCEPT:
        return {"decision": "accept"}
    if word.lower() in REFUSE:
        return {"decision": "refuse", "reason": rest.strip()}
    raise ValueError("say accept, refuse WHY, or what to change as JSON")


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the plan is not JSON: {error}") from error


def _merge(plan: Plan, changes: dict[str, Any]) -> dict[str, Any]:
    """The plan as plain values, with those of its fields, and of its recipe's, that are given."""
    whole = plan.model_dump() | {"reason": "Edited by hand."} | changes
    if isinstance(changes.get("recipe"), dict):
        whole["recipe"] = plan.recipe.model_dump() | changes["recipe"]
    return whole


def _describe(problem: Any) -> str:
    return f"{'.'.join(str(part) for part in problem['loc']) or 'answer'}: {problem['msg'].lower()}"


def resolve_edit(plan: Plan, state: State, session: Session) -> Edited:
    """An edited plan, weighed by the lessons like any other, and its order. Raises ValueError when it cannot be."""
    refuse_above_target(plan, state.config)
    with open_bench(state, session) as bench:
        situation = gather_situation(bench, state, session.progress, is_last=False)
        plan = situation.orders.weigh(plan)
        measure = measure_with(bench, state.profile, state.current, session.progress)
        order = situation.orders.resolve(plan, measure)
        return Edited(plan, order, keep_order(bench.store, plan, order))


def after_approve(state: State) -> Literal["prune", "plan", "finish"]:
    """Prune what was approved; plan again, or finish, after a refusal."""
    if not is_unmeasured(state):
        return "prune"
    return "finish" if state.stop else "plan"
