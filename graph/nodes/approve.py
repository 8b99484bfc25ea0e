"""approve: a person sees the plan and what it is predicted to do, and accepts, edits or refuses it.

The node interrupts the graph; whoever runs it brings the answer. In the terminal that is one line; in Studio a form,
made from the schema that comes with the question. An answer that cannot be used is asked for again, with the reason.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from langgraph.runtime import Runtime
from langgraph.types import interrupt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graph.config import RunConfig
from graph.planning.orders import allocate_plan, apply_lessons, describe_plan, find_recipe, refuse_above_target
from graph.planning.plan import Plan
from graph.planning.verdict import decide_stop
from graph.runs.replay import find_decision
from graph.runs.session import enter, open_bench
from graph.state import State, Trial
from tools.plans.layer_profile import LayerProfile

ReadLayers = Callable[[Plan], Sequence[LayerProfile]]
"""The profile with what a plan's allocation needs."""

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

        def read_layers(plan: Plan) -> Sequence[LayerProfile]:
            return bench.read_layers(state.profile, find_recipe(plan, state.config), session.progress)

        if state.replay:
            answer = Answer(**find_decision(state.replay, state.iteration))
        else:
            answer = ask(state, state.plan, read_layers)
        layers = read_layers(answer.plan or state.plan)
    session.emit("approval", iteration=state.iteration, decision=answer.decision, reason=answer.reason)
    if answer.decision == "refuse":
        trial = record_refusal(state, state.plan, layers, answer.reason)
        session.emit("trial", **trial.model_dump())
        stop = decide_stop(state.model_copy(update={"trials": [*state.trials, trial]}))
        if stop:
            session.emit("note", text=stop)
        return {"trials": [trial], "stop": stop, "seconds": session.seconds}
    plan = answer.plan or state.plan
    if answer.plan:
        session.emit(
            "plan",
            iteration=state.iteration,
            planner="you",
            plan=describe_plan(plan),
            reason=plan.reason,
            predicted_kl=allocate_plan(layers, plan, state.config).predicted_kl,
            details=plan.model_dump(),
        )
    return {"plan": plan, "seconds": session.seconds}


def ask(state: State, plan: Plan, read_layers: ReadLayers) -> Answer:
    """Interrupt until there is an answer that can be carried out; what it edits is checked and complete."""
    question = {
        "iteration": state.iteration,
        "plan": plan.model_dump(exclude={"multipliers"}),
        "line": describe_plan(plan),
        "reason": plan.reason,
        "predicted_kl": allocate_plan(read_layers(plan), plan, state.config).predicted_kl,
        "problem": "",
    }
    while True:
        given = interrupt(question, response_schema=Answer.model_json_schema())
        try:
            answer = read_answer(given, plan)
            if answer.plan is None:
                return answer
            edited = check_edit(answer.plan, state, read_layers)
            return answer.model_copy(update={"plan": edited})
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


def check_edit(plan: Plan, state: State, read_layers: ReadLayers) -> Plan:
    """An edited plan, weighed by the lessons like any other. Raises ValueError when it cannot be carried out."""
    refuse_above_target(plan, state.config)
    layers = read_layers(plan)
    plan = apply_lessons(plan, state.lessons, layers, state.config)
    allocate_plan(layers, plan, state.config)
    return plan


def record_refusal(state: State, plan: Plan, layers: Sequence[LayerProfile], reason: str) -> Trial:
    """A refused plan among the trials, so that planners and people see it and nobody proposes it again."""
    return Trial(
        iteration=state.iteration,
        checkpoint=state.accepted,
        sparsity=plan.sparsity,
        perplexity=None,
        kl=None,
        predicted_kl=allocate_plan(layers, plan, state.config).predicted_kl,
        verdict="refuse",
        reason=reason,
        plan=describe_plan(plan),
        recipe=plan.recipe,
    )


def after_approve(state: State) -> Literal["prune", "plan", "finish"]:
    """Prune what was approved; plan again, or finish, after a refusal."""
    refused = bool(state.trials) and state.trials[-1].iteration == state.iteration
    if not refused:
        return "prune"
    return "finish" if state.stop else "plan"
