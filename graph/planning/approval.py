"""What a person says to a plan, and a plan as a person edited it: examined like any other before it is carried out.

A person may answer a question (`--approve plans`), or edit the state in Studio, between any two nodes. What a run's log
says of a plan is the word of whoever made it; a state with another plan was edited since.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from langgraph.types import interrupt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graph.llm.answers import explain
from graph.planning.choose import weigh_in_bounds
from graph.planning.orders import describe_plan, find_order, keep_order
from graph.planning.plan import WORDS, Plan
from graph.planning.situation import gather_situation, resolve_plan
from graph.runs.session import Session, open_bench
from graph.state import State
from tools.base.errors import UserError
from tools.base.rundir import scan_events
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


class Settled(NamedTuple):
    """A plan that can be carried out."""

    plan: Plan
    order: WorkOrder
    kept: str
    """Hash of the order's artifact."""
    edited: bool = False
    """Whether a person made it of another, and the log does not say so yet."""


def settle_plan(state: State, session: Session) -> Settled:
    """The state's plan with its order; where a person edited it since, examined as a planner's plan is.

    Raises ValueError with what is wrong with an edited one, BrokenPlan where its KL curves cannot be measured.
    """
    assert state.plan is not None, "plan runs first"
    if _is_logged(state.plan, state.iteration, session):
        with open_bench(state, session) as bench:
            order = find_order(bench, state, session.progress)
            return Settled(state.plan, order, keep_order(bench.store, state.plan, order))
    return examine_edit(state.plan, state, session)


def _is_logged(plan: Plan, iteration: int, session: Session) -> bool:
    """Whether the run's log has this plan as the last one of the iteration, whatever is said to explain it."""
    logged = [event for _, event in scan_events(session.directory, "plan") if event["iteration"] == iteration]
    # Words lose a key or a token on the way into the log.
    return bool(logged) and Plan.model_validate(logged[-1]["details"]).model_dump(exclude=WORDS) == plan.model_dump(
        exclude=WORDS
    )


def examine_edit(plan: Plan, state: State, session: Session) -> Settled:
    """An edited plan, held to all that a planner's is and weighed by the lessons, and its order. Raises ValueError."""
    bench_of_run = partial(open_bench, state, session)
    asked = state.plan.new_texts if state.plan else []
    if plan.new_texts != [text for text in asked if text.name in state.config.text]:
        raise ValueError("new_texts were written when the plan was made; leave them as they are, and change recipe.mix")
    situation = gather_situation(bench_of_run, state, session.progress, is_last=False)
    plan = weigh_in_bounds(plan, situation)
    return Settled(plan, *resolve_plan(bench_of_run, situation, state, plan, session.progress), edited=True)


def ask(
    state: State, settled: Settled | None, examine: Callable[[Plan], Settled], problem: str = ""
) -> tuple[Answer, Settled | None]:
    """Interrupt until there is an answer that can be carried out; with it, the plan that it leads to.

    The plan in question is the state's, `settled`, or with its `problem` one that cannot be. `examine` raises
    ValueError for an edited plan that cannot be carried out.
    """
    plan = settled.plan if settled else state.plan
    assert plan is not None, "plan runs first"
    question = {
        "iteration": state.iteration,
        "plan": plan.model_dump(exclude={"multipliers"}),
        "line": describe_plan(plan),
        "reason": plan.reason,
        "predicted_kl": settled.order.predicted_kl if settled else None,
        "problem": problem,
    }
    while True:
        given = interrupt(question, response_schema=Answer.model_json_schema())
        try:
            answer = read_answer(given, plan)
            if answer.decision == "accept" and settled is None:
                raise ValueError(f"it cannot be carried out as it is: {problem}")
            return answer, examine(answer.plan) if answer.plan else settled
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
        changes = read_json(changes, "the plan")
    try:
        answer = Answer.model_validate(given)
        if answer.decision != "edit" and isinstance(changes, dict) and not _says_the_same(plan, changes):
            raise ValueError(f"a plan is given, and the decision is {answer.decision}; edit has it carried out")
        if answer.decision == "edit":
            if not isinstance(changes, dict):
                raise ValueError("to edit, give the plan, or those of its fields that change")
            answer.plan = Plan.model_validate(_merge(plan, changes))
    except ValidationError as error:
        raise ValueError("; ".join(explain(error).splitlines())) from error
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


def read_json(text: str, what: str) -> Any:
    """What a person wrote as JSON. Raises ValueError, which says `what` is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def _says_the_same(plan: Plan, changes: dict[str, Any]) -> bool:
    """Whether a form holds the plan as it was shown, but for words. Raises ValidationError."""
    return Plan.model_validate(_merge(plan, changes)).model_dump(exclude=WORDS) == plan.model_dump(exclude=WORDS)


def _merge(plan: Plan, changes: dict[str, Any]) -> dict[str, Any]:
    """The plan as plain values, with those of its fields, and of its recipe's and its cut's, that are given."""
    whole = plan.model_dump(exclude=WORDS) | {"reason": "Edited by hand."} | changes
    if isinstance(changes.get("recipe"), dict):
        whole["recipe"] = plan.recipe.model_dump() | changes["recipe"]
    if plan.cut and isinstance(changes.get("cut"), dict):
        whole["cut"] = plan.cut.model_dump() | changes["cut"]
    return whole
