"""Who makes something of a goal: the planner's model, the rule in its stead, and last a person."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from langgraph.types import interrupt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graph.config import HEURISTIC, RunConfig, read_prompt
from graph.goals.schema import Brief, check_brief, count_allowed, weigh_alike
from graph.llm.ask import CallRecord, KeepPrompt, Reply, ask
from graph.llm.attempts import UNMETERED, Meter
from graph.llm.ladder import AgentError, describe_schema
from graph.llm.models import open_model
from graph.llm.quoting import data_block, quote_data
from graph.llm.spending import Account, CapReached
from graph.llm.toolbox import do_now
from graph.planning.approval import ACCEPT, read_json
from graph.planning.orders import find_order
from graph.planning.plan import Plan
from graph.runs.session import Session
from graph.state import State
from tools.base.errors import BrokenPlan, ImpossiblePlan
from tools.base.named import hide_directories, name_source
from tools.base.options import describe_problem
from tools.base.words import show_short
from tools.measure.recall import list_texts
from tools.plans.mix import Mix, read_mix
from tools.results.schema import Usage, Weighting
from tools.results.sentences import describe_weighting

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.results.losses import Evaluation
    from tools.workbench.bench import Workbench


def find_shares(config: RunConfig, plan: Plan) -> dict[str, float]:
    """What each named text counts in what a plan fits: as the plan mixes them, or else as in the run."""
    mix = dict(plan.recipe.mix)
    return {name: mix.get(name, 0.0) for name in config.text} if mix else config.text_shares


def list_other_weights(shares: Mapping[str, float], written: Collection[str] = ()) -> list[Mix]:
    """What a plan's shares of the texts are compared with: all texts alike, and the one that counts most left out.

    Texts that were `written` for single plans count nothing in either.
    """
    fitted, shares = read_mix(shares), {name: share for name, share in shares.items() if name not in written}
    most = max(shares, key=shares.__getitem__)
    rest = {name: share for name, share in shares.items() if name != most}
    alike, without = dict.fromkeys(shares, 1.0), rest if any(rest.values()) else dict.fromkeys(rest, 1.0)
    mixes = dict.fromkeys(read_mix(weights) for weights in (alike, without))
    return [mix for mix in mixes if mix and mix != fitted]


def weigh_otherwise(bench: "Workbench", state: State, session: Session) -> list[Weighting]:
    """What each text loses of the accepted weights, then of its plan shared out and pruned by each of the others.

    On the validation windows that the run's own plans were judged by. None where nobody asked for it, and with a
    warning where the plan prunes nothing by weights. The weights in the model end as any.
    """
    plan = state.accepted_plan
    if not state.config.check_weights:
        return []
    if plan is None or any(group.recipe.mix for group in plan.groups):
        what = "fitted by other weights in some of its layers" if plan else "of no plan that was accepted last"
        session.warn(f"the model that is kept is {what}, so that weights of texts are not compared")
        return []
    own = bench.evaluator.evaluate(state.accepted, "validation", state.profile, session.progress)
    shares = find_shares(state.config, plan)
    found = [Weighting(weights=shares, texts=list_texts(own))]
    for mix in list_other_weights(shares, [text.name for text in state.written]):
        try:
            theirs = measure_by(bench, state, plan, mix, session.progress)
        except (ImpossiblePlan, BrokenPlan) as error:
            session.warn(f"the kept plan by other weights of texts: {error}; they are not compared")
            continue
        weights = {name: dict(mix).get(name, 0.0) for name in state.config.text}
        found.append(Weighting(weights=weights, texts=list_texts(theirs, own)))
        session.emit("note", text=describe_weighting(found[-1]))
    return found


def measure_by(bench: "Workbench", state: State, plan: Plan, mix: Mix, progress: "Progress") -> "Evaluation":
    """Losses of a plan on the validation text, by other weights of texts; its layers are let go again.

    Raises ImpossiblePlan, and BrokenPlan where it cannot be carried out.
    """
    other = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"mix": mix})})
    order = find_order(bench, state.model_copy(update={"plan": other, "order": ""}), progress)
    checkpoint = bench.pruner.prune(state.profile, order, progress)
    losses = bench.evaluator.evaluate(
        checkpoint, "validation", state.profile, progress, "validation, other weights of texts"
    )
    bench.pruner.forget([state.accepted])
    return losses


SHOWN = 240
"""Characters of a text that are shown, from its beginning."""


class Sight(NamedTuple):
    """What is known of a named text before anything is pruned."""

    name: str
    begins: str
    """Its calibration windows, from the first token."""
    perplexity: float | None
    """The dense model's, on its validation windows."""
    predicted_kl: float | None
    """By its own KL curves, nats per token, if the run's target were shared out by all texts as the config has them;
    None where whole parts go."""


def brief_with_chat(
    config: RunConfig,
    texts: Sequence[Sight],
    model: BaseChatModel,
    on_call: Callable[[CallRecord], None] | None = None,
    keep_prompt: KeepPrompt = do_now,
    carry_out: Callable[[Callable[[], Reply]], Reply] = do_now,
    meter: Meter = UNMETERED,
) -> Brief:
    """Ask a chat model for the brief of a run. Raises AgentError when no usable one came."""
    return ask(
        model,
        Brief,
        keep_prompt(lambda: brief_messages(config, texts)),
        check=lambda brief: check_brief(brief, config),
        on_call=on_call,
        carry_out=carry_out,
        meter=meter,
    )


def brief_messages(config: RunConfig, texts: Sequence[Sight]) -> list[AnyMessage]:
    """Instructions, and the goal with what there is to weigh."""
    schema = json.dumps(describe_schema(Brief), separators=(",", ":"), ensure_ascii=False)
    parts = [
        f"Model: {quote_data(name_source(config.model), 200)}; {config.target_sparsity:.0%} of its weights go, "
        f"in at most {config.max_iterations} rounds.",
        "The goal:\n" + data_block("goal", [quote_data(line, 2000) for line in config.goal.splitlines()]),
        "The texts:\n" + data_block("texts", [_describe(text, config) for text in texts]),
        _describe_given(config),
        _describe_room(config),
        f"Questions are asked: {_name(config.questions)}." if config.questions else "",
    ]
    return [
        SystemMessage(read_prompt("brief").replace("{schema}", schema)),
        HumanMessage("\n\n".join(part for part in parts if part)),
    ]


def _describe(text: Sight, config: RunConfig) -> str:
    begins, perplexity = quote_data(text.begins, SHOWN), show_short(text.perplexity)
    dense = f"dense perplexity {perplexity}"
    if text.predicted_kl is not None:
        dense += f"; predicted KL {show_short(text.predicted_kl)}"
    return f"{text.name}: from {_name(config.text[text.name])}; {dense}; begins: {begins}"


def _name(source: str) -> str:
    return quote_data(hide_directories(name_source(source)), 200)


def _describe_given(config: RunConfig) -> str:
    """What the person has settled in figures: weights that only the goal's words can overrule, and bounds that hold."""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in config.text_weights.items())
    bounds = ", ".join(f"{name} {rise:g}" for name, rise in config.text_bounds.items())
    told = [f"Given with the goal, to be kept where it says nothing else: weights {weights}."] * bool(weights)
    held = [f"max_rise {bounds}"] * bool(bounds)
    held += [f"min_answers {config.min_fact_retention:g}"] * bool(config.min_fact_retention)
    told += [f"Bounds that hold, and may only be tightened: {'; '.join(held)}."] * bool(held)
    return " ".join(told)


def _describe_room(config: RunConfig) -> str:
    most = count_allowed(config)
    return f"new_texts: {most} at most." if most else "new_texts: none; leave the list empty."


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
