"""plan: the agent decides the next round; its plan is checked before anything is pruned."""

from collections.abc import Sequence
from typing import Any, Literal

from langchain_core.messages import AnyMessage
from langgraph.runtime import Runtime

from graph.agents.chat import AgentError, CallRecord, open_chat
from graph.agents.heuristic import plan_by_rule
from graph.agents.planner import Situation, plan_with_chat
from graph.config import RunConfig
from graph.plans import allocate_plan, describe_plan
from graph.session import Session, enter, open_bench
from graph.state import Plan, State, Usage, last_accepted


def plan(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Ask the planner for the next round. Raises AgentError (resumable) when it fails and there is no fallback."""
    state = state.model_copy(update={"iteration": state.iteration + 1})
    session = enter("plan", state, runtime)
    with open_bench(state, session) as bench:
        layers = bench.read_profile(state.profile).layers
        sparsity = dict(zip(bench.by_name, bench.sparsities(), strict=True))
    situation = Situation(
        config=state.config,
        layers=layers,
        sparsity=sparsity,
        dense=state.dense or _missing("the dense model's trial"),
        accepted=last_accepted(state.trials),
        accepted_plan=state.accepted_plan,
        trials=state.trials,
        lessons=state.lessons,
        iteration=state.iteration,
    )
    chosen, usage = choose_plan(situation, state.usage, session)
    if chosen is None:
        session.emit("note", text="every lever of the rule has been tried")
        return {
            "iteration": state.iteration - 1,
            "stop": "every lever of the rule has been tried",
            "seconds": session.seconds,
        }
    session.emit(
        "plan",
        iteration=state.iteration,
        planner=state.config.planner,
        plan=describe_plan(chosen),
        reason=chosen.reason,
        predicted_kl=allocate_plan(layers, chosen, state.config).predicted_kl,
        details=chosen.model_dump(),
    )
    return {
        "iteration": state.iteration,
        "plan": chosen,
        "usage": usage,
        "seconds": session.seconds,
    }


def choose_plan(situation: Situation, usage: Usage, session: Session) -> tuple[Plan | None, Usage]:
    """The planner's plan, or its fallback's, and the tokens spent so far. Raises AgentError without a fallback."""
    config = situation.config
    if config.planner == "heuristic":
        return plan_by_rule(situation), usage
    calls: list[CallRecord] = []

    def record(call: CallRecord) -> None:
        calls.append(call)
        session.emit("reply", planner=config.planner, **call.model_dump())

    def check(candidate: Plan) -> None:
        if candidate.sparsity > config.target_sparsity + 1e-9:
            raise ValueError(
                f"sparsity {candidate.sparsity:g} is above the target; plan at most {config.target_sparsity:g}"
            )
        allocate_plan(situation.layers, candidate, config)

    def keep_prompt(messages: Sequence[AnyMessage]) -> None:
        prompt = [{"role": message.type, "text": message.text} for message in messages]
        session.record("prompt", planner=config.planner, iteration=situation.iteration, messages=prompt)

    try:
        model = open_chat(config.planner, timeout=config.planner_timeout, retries=config.planner_retries)
        plan = plan_with_chat(situation, model, on_call=record, check=check, on_prompt=keep_prompt)
    except AgentError as error:
        _tell_usage(session, usage := add_calls(usage, calls, config))
        if config.planner_fallback == "none":
            raise
        session.warn(f"{error}; the fallback planner ({config.planner_fallback}) plans this round")
        return plan_by_rule(situation), usage
    _tell_usage(session, usage := add_calls(usage, calls, config))
    return plan, usage


def add_calls(usage: Usage, calls: list[CallRecord], config: RunConfig) -> Usage:
    """Tokens and dollars after these calls."""
    sent = sum(call.input_tokens for call in calls)
    written = sum(call.output_tokens for call in calls)
    cost = (sent * config.planner_price_input + written * config.planner_price_output) / 1e6
    return Usage(
        calls=usage.calls + len(calls),
        input_tokens=usage.input_tokens + sent,
        output_tokens=usage.output_tokens + written,
        cost=usage.cost + cost,
    )


def _tell_usage(session: Session, usage: Usage) -> None:
    session.emit("usage", **usage.model_dump())


def _missing(what: str) -> Any:
    raise RuntimeError(f"{what} is missing from the state; start the run at its first node")


def after_plan(state: State) -> Literal["prune", "finish"]:
    """Prune what was planned; finish when nothing is left to plan."""
    return "finish" if state.stop else "prune"
