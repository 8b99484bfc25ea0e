"""plan: the agent decides the next round; its plan is checked before anything is pruned."""

from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.choose import choose_plan
from graph.planning.orders import keep_order, measure_with, record_plan
from graph.planning.situation import gather_situation
from graph.planning.toolbox import Evaluated, open_toolbox
from graph.planning.verdict import decide_stop
from graph.runs.replay import find_plan
from graph.runs.session import enter, open_bench
from graph.state import State


def plan(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Ask the planner for the next round. Raises AgentError (resumable) when it fails and there is no fallback."""
    state = state.model_copy(update={"iteration": state.iteration + 1})
    session = enter("plan", state, runtime)
    with open_bench(state, session) as bench:
        after = state.model_copy(update={"evaluated_tokens": state.evaluated_tokens + state.trial_tokens})
        situation = gather_situation(bench, state, session.progress, is_last=bool(decide_stop(after)))
        evaluated = Evaluated(state.evaluated_tokens, state.config.max_evaluated_tokens, state.trial_tokens)
        measure = measure_with(bench, state.profile, state.current, session.progress)
        if state.replay:
            planner, usage = f"the record of {state.replay}", state.usage
            chosen, stop = find_plan(state, lambda recorded: situation.orders.resolve(recorded, measure))
        else:
            toolbox = open_toolbox(bench, situation, state, session, runtime.store, evaluated)
            caps = runtime.context or state.config
            chosen, usage, planner = choose_plan(situation, state.usage, session, caps, toolbox)
            chosen = chosen and situation.orders.weigh(chosen)
            stop = "every lever of the rule has been tried"
        if chosen is None:
            session.emit("note", text=stop)
            return {"iteration": state.iteration - 1, "stop": stop, "seconds": session.seconds}
        order = situation.orders.resolve(chosen, measure)
        kept = keep_order(bench.store, chosen, order)
    session.emit("plan", iteration=state.iteration, planner=planner, **record_plan(chosen, order))
    return {
        "iteration": state.iteration,
        "plan": chosen,
        "order": kept,
        "usage": usage,
        "evaluated_tokens": evaluated.tokens,
        "seconds": session.seconds,
    }


def after_plan(state: State) -> Literal["approve", "prune", "finish"]:
    """Prune what was planned, once a person has approved it where the config asks for that; finish without a plan."""
    if state.stop:
        return "finish"
    return "approve" if state.config.approve == "plans" else "prune"
