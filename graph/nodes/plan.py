"""plan: the agent decides the next round; its plan is checked before anything is pruned."""

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from langgraph.runtime import Runtime

from graph.config import HEURISTIC, RunConfig
from graph.goals.schema import follow_new_texts
from graph.nodes.profile import measure_dense
from graph.planning.budget import TokenBudget, find_lateness, open_budget
from graph.planning.choose import choose_plan, note_probes, open_toolbox
from graph.planning.orders import record_plan
from graph.planning.plan import Plan
from graph.planning.recipes import count_new_tokens, fit_to_new_texts, list_unwritten
from graph.planning.situation import Situation, gather_situation, resolve_plan
from graph.planning.verdict import decide_stop, is_unmeasured, record_breakage
from graph.runs.replay import find_breakage, find_plan
from graph.runs.session import Session, enter, open_bench
from graph.state import State, last_accepted
from tools.base.errors import BrokenPlan, DegenerateText, SharedText
from tools.plans.work_order import WorkOrder
from tools.workbench.store import DENSE

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench


def plan(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Ask the planner for the next round. Raises AgentError (resumable) when it fails and there is no fallback.

    A plan whose texts cannot be written, or whose KL curves cannot be measured, is a trial without figures, which is
    rolled back.
    """
    state = state.model_copy(update={"iteration": state.iteration + 1})
    session = enter("plan", state, runtime)
    if not state.trials and (late := find_lateness(state, session.seconds)):
        session.emit("note", text=late)
        return {"iteration": state.iteration - 1, "stop": late, "seconds": session.seconds}
    now = Planning(state, session, open_budget(state))
    if state.replay:
        planner, usage = f"the record of {state.replay}", state.usage
        asked, stop = find_plan(state, lambda recorded: now.resolve(recorded)[0])
    else:
        toolbox = open_toolbox(now.open_bench, now.situation, state, session, runtime.store, now.budget)
        caps = runtime.context or state.config
        asked, usage, planner = choose_plan(now.situation, state.usage, session, caps, toolbox)
        asked = asked and now.situation.orders.weigh(asked)
        stop = explain_end(now.situation, planner)
    if asked is None:
        session.emit("note", text=stop)
        spent = {**now.list_spent(), "usage": usage, "seconds": session.seconds}
        return {"iteration": state.iteration - 1, "stop": stop} | spent
    chosen = asked
    try:
        if state.replay and (reason := find_breakage(state.replay, state.iteration, planned=True)):
            raise BrokenPlan(reason)
        if now.write_texts(asked):  # a recorded plan has its texts by now, and in its mix
            chosen = now.situation.orders.weigh(fit_to_new_texts(asked, now.state.config))
        order, kept = now.resolve(chosen)
    except BrokenPlan as error:
        session.emit("plan", iteration=state.iteration, planner=planner, **now.record(asked) | {"order": ""})
        broke = record_breakage(state.model_copy(update={"plan": asked}), None, str(error), session)
        return {**now.update(asked), **now.written, "usage": usage, "order": ""} | broke
    session.emit("plan", iteration=state.iteration, planner=planner, **record_plan(chosen, order))
    return {**now.update(chosen), **now.written, "usage": usage, "order": kept, "seconds": session.seconds}


class Planning:
    """What is known while a round is planned; another state, once its plan's texts are written."""

    def __init__(self, state: State, session: Session, budget: TokenBudget) -> None:
        self.state, self._session, self.budget = state, session, budget
        after = state.model_copy(update={"evaluated_tokens": state.evaluated_tokens + state.trial_tokens})
        self._is_last = bool(decide_stop(after))
        self.situation = self._gather()
        self.written: dict[str, Any] = {}
        """What of the state is another since."""

    def open_bench(self) -> AbstractContextManager["Workbench"]:
        """The run's workbench."""
        return open_bench(self.state, self._session)

    def _gather(self) -> Situation:
        return gather_situation(
            self.open_bench, self.state, self._session.progress, is_last=self._is_last, budget=self.budget
        )

    def write_texts(self, plan: Plan) -> bool:
        """Have the dense model write those of a plan's texts that are not there, and profile it once more with them;
        whether there were any.

        Raises BrokenPlan where what it wrote came out degenerate, or is found in another text.
        """
        new = list_unwritten(plan, self.state.config)
        if not new:
            return False
        names = ", ".join(text.name for text in new)
        self._session.emit("note", text=f"the model writes {names} for this plan, and is profiled once more with it")
        accepted = last_accepted(self.state.trials) is not None
        tokens = self.budget.tokens + count_new_tokens(self.state.config, len(new), accepted=accepted)
        config = follow_new_texts(self.state.config, new)
        followed = self.state.model_copy(update={"config": config, "current": DENSE})
        try:
            with open_bench(followed, self._session) as bench:
                profile = bench.profile(self._session.progress)
                dense = measure_dense(bench, followed, profile, self._session)
        except (DegenerateText, SharedText) as error:
            raise BrokenPlan(str(error)) from error
        self.written = {"config": config, "profile": profile, "dense": dense, "written": [*self.state.written, *new]}
        self.state = self.state.model_copy(update=self.written)
        self.budget = replace(self.budget, config=config, tokens=tokens, trial=self.state.trial_tokens)
        self.situation = self._gather()
        return True

    def resolve(self, plan: Plan) -> tuple[WorkOrder, str]:
        """As `resolve_plan`, with the plan's texts."""
        self.write_texts(plan)
        return resolve_plan(self.open_bench, self.situation, self.state, plan, self._session.progress)

    def record(self, plan: Plan) -> dict[str, Any]:
        """As `record_plan`, of one that broke before there was an order."""
        return record_plan(plan, self.situation.orders.draft(plan))

    def update(self, plan: Plan) -> dict[str, Any]:
        """What a state is told of a plan, and of what was spent for it."""
        self.budget.pay(self.budget.list_costs(plan, None))
        probed = {probed.order: probed.tokens for probed in self.budget.probed}
        return {"iteration": self.state.iteration, "plan": plan, "probed": probed} | self.list_spent()

    def list_spent(self) -> dict[str, Any]:
        """What a state is told of what was put through the model, and what came of it."""
        return {
            "evaluated_tokens": self.budget.tokens,
            "counted": self.budget.counted,
            "probes": note_probes(self.state, self.budget),
        }


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
