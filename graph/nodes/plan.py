"""plan: the agent decides the next round; its plan is checked before anything is pruned."""

import math
from functools import partial
from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.config import HEURISTIC, RunConfig
from graph.planning.budget import open_budget
from graph.planning.choose import choose_plan
from graph.planning.orders import record_plan
from graph.planning.plan import Plan
from graph.planning.situation import Situation, gather_situation, resolve_plan
from graph.planning.toolbox import note_probes, open_toolbox
from graph.planning.unmeasured import is_unmeasured, record_breakage
from graph.planning.verdict import decide_stop
from graph.runs.replay import find_breakage, find_plan
from graph.runs.session import enter, open_bench
from graph.state import State
from tools.base.errors import BrokenPlan
from tools.plans.work_order import WorkOrder


def plan(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Ask the planner for the next round. Raises AgentError (resumable) when it fails and there is no fallback.

    A plan whose KL curves cannot be measured is a trial without figures, which is rolled back.
    """
    state = state.model_copy(update={"iteration": state.iteration + 1})
    session = enter("plan", state, runtime)
    after = state.model_copy(update={"evaluated_tokens": state.evaluated_tokens + state.trial_tokens})
    bench_of_run = partial(open_bench, state, session)
    budget = open_budget(state)
    is_last = bool(decide_stop(after))
    situation = gather_situation(bench_of_run, state, session.progress, is_last=is_last, budget=budget)

    def resolve(plan: Plan) -> tuple[WorkOrder, str]:
        return resolve_plan(bench_of_run, situation, state, plan, session.progress)

    if state.replay:
        planner, usage = f"the record of {state.replay}", state.usage
        chosen, stop = find_plan(state, lambda recorded: resolve(recorded)[0])
    else:
        toolbox = open_toolbox(bench_of_run, situation, state, session, runtime.store, budget)
        caps = runtime.context or state.config
        chosen, usage, planner = choose_plan(situation, state.usage, session, caps, toolbox)
        chosen = chosen and situation.orders.weigh(chosen)
        stop = explain_end(situation, planner)
    if chosen is None:
        session.emit("note", text=stop)
        return {"iteration": state.iteration - 1, "stop": stop, "seconds": session.seconds}
    budget.pay(budget.list_costs(chosen, None))
    update = {
        "iteration": state.iteration,
        "plan": chosen,
        "usage": usage,
        "evaluated_tokens": budget.tokens,
        "counted": budget.counted,
        "paces": budget.paces,
        "probed": {probed.order: probed.tokens for probed in budget.probed},
        "probes": note_probes(state, budget),
    }
    try:
        if state.replay and (reason := find_breakage(state.replay, state.iteration, planned=True)):
            raise BrokenPlan(reason)
        order, kept = resolve(chosen)
    except BrokenPlan as error:
        record = record_plan(chosen, situation.orders.draft(chosen)) | {"order": ""}
        session.emit("plan", iteration=state.iteration, planner=planner, **record)
        broke = record_breakage(state.model_copy(update={"plan": chosen}), None, str(error), session)
        return {**update, "order": ""} | broke
    session.emit("plan", iteration=state.iteration, planner=planner, **record_plan(chosen, order))
    return {**update, "order": kept, "seconds": session.seconds}


def explain_end(situation: Situation, planner: str = HEURISTIC) -> str:
    """Why there is no plan any more."""
    if planner != HEURISTIC:
        return "the planner gave no usable plan"
    left = situation.budget.left if situation.budget else math.inf
    levers = "every lever of the rule" + (f" that {left:,.0f} tokens allow" if left < math.inf else "")
    if not situation.broken:
        return f"{levers} has been tried"
    methods = " and ".join(sorted(situation.broken))
    return f"{levers} has been tried, but for {methods}, which broke while it was carried out"


def after_plan(state: State) -> Literal["approve", "prune", "rollback", "finish"]:
    """Prune what was planned, once a person has approved it where the config asks for that; finish without a plan.

    What broke before it could be approved is rolled back.
    """
    if state.stop:
        return "finish"
    if is_unmeasured(state):
        return "rollback"
    return "approve" if state.config.approves_plans else "prune"
