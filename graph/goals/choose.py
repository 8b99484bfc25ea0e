"""Who makes something of a goal: the planner's model, the rule in its stead, and last a person."""

from collections.abc import Sequence
from typing import Any, Literal

from langgraph.types import interrupt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graph.config import HEURISTIC, RunConfig
from graph.goals.chat import Sight, brief_with_chat
from graph.goals.schema import Brief, check_brief, weigh_alike
from graph.llm.ladder import AgentError
from graph.llm.models import open_model
from graph.llm.spending import Account, CapReached
from graph.planning.approval import ACCEPT, read_json
from graph.runs.session import Session
from tools.base.options import describe_problem
from tools.results.schema import Usage


class Answer(BaseModel):
    """What a person says to what was made of a goal."""

    model_config = ConfigDict(extra="forbid")

    decision: Literal["accept", "edit"] = Field(description="accept: go by it. edit: go by the brief given here.")
    brief: Brief | None = Field(None, description="For edit: what to go by; what is left out stays as it is.")


def choose_brief(
    config: RunConfig, texts: Sequence[Sight], usage: Usage, session: Session, caps: RunConfig
) -> tuple[Brief, Usage, str]:
    """(what is made of the goal, the tokens spent on agents so far, who made it).

    Raises AgentError where the planner fails and nobody stands in, and CapReached when the agents have spent what
    `caps` allows.
    """
    if config.planner == HEURISTIC:
        return weigh_alike(config), usage, HEURISTIC
    account = Account("planner", session, usage, config, caps, 0)
    try:
        model = open_model(config.planner, config, session.progress)
        brief = account.converse(
            lambda: brief_with_chat(
                config, texts, model, account.keep_call, account.keep_prompt, account.carry_out, account
            )
        )
    except CapReached:
        raise
    except AgentError as error:
        if config.planner_fallback == "none":
            raise
        session.warn(f"{error}; {describe_rule(config)}")
        return weigh_alike(config), account.usage, HEURISTIC
    return brief, account.usage, config.planner


def describe_rule(config: RunConfig) -> str:
    """What a rule makes of any goal."""
    return "the texts count as text_weights say" if config.text_weights else "every named text counts alike"


def ask_person(brief: Brief, config: RunConfig) -> tuple[Brief, bool]:
    """(the brief that a person accepts or edits, whether it was edited); interrupts until there is one."""
    question: dict[str, Any] = {
        "goal": config.goal,
        "brief": brief.model_dump(),
        "line": brief.line,
        "reason": brief.reason,
        "problem": "",
    }
    while True:
        given = interrupt(question, response_schema=Answer.model_json_schema())
        try:
            answer = read_answer(given, brief)
            chosen = answer.brief or brief
            check_brief(chosen, config)
            return chosen, answer.brief is not None
        except ValueError as error:
            question = question | {"problem": str(error)}


def read_answer(given: Any, brief: Brief) -> Answer:
    """An answer from a form (an object) or a terminal (a line). Raises ValueError with what to say instead."""
    if isinstance(given, str):
        line = given.strip()
        if line.lower() in ACCEPT:
            return Answer(decision="accept")
        if not line.startswith("{"):
            raise ValueError("answer with accept, or with a JSON object of the fields of the brief that change")
        given = {"decision": "edit", "brief": line}
    if not isinstance(given, dict):
        raise ValueError("answer with an object that holds a decision")
    given = {name: value for name, value in given.items() if value is not None}
    changes = given.pop("brief", None)
    try:
        answer = Answer.model_validate(given)
        if answer.decision != "edit":
            if isinstance(changes, dict) and brief.model_dump() | changes != brief.model_dump():
                raise ValueError(f"a brief is given, and the decision is {answer.decision}; edit has it followed")
            return answer
        if isinstance(changes, str):
            changes = read_json(changes, "the brief")
        if not isinstance(changes, dict):
            raise ValueError("to edit, give the brief, or those of its fields that change")
        return Answer(decision="edit", brief=Brief.model_validate(brief.model_dump() | changes))
    except ValidationError as error:
        raise ValueError("; ".join(describe_problem(problem) for problem in error.errors()[:3])) from error
