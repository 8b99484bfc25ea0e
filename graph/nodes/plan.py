"""plan: the agent decides the next round; its plan is checked before anything is pruned."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore

from graph.config import RunConfig
from graph.llm.ask import AgentError
from graph.llm.models import HEURISTIC, open_model
from graph.llm.spending import Account, CapReached
from graph.llm.toolbox import Toolbox, ToolRecord
from graph.memory.store import search_lessons
from graph.nodes.accept import RECENT
from graph.nodes.reflect import decide_stop
from graph.planning.brief import (
    MAX_UNTRIED,
    Situation,
    advise_against,
    describe_lesson,
    plan_with_chat,
    recount_trial,
)
from graph.planning.orders import allocate_plan, apply_lessons, describe_plan, find_recipe, refuse_above_target
from graph.planning.rule import find_relief, plan_by_rule, plan_refinements
from graph.runs.replay import find_plan
from graph.runs.session import Session, enter, open_bench
from graph.state import Plan, State, Trial, last_accepted
from tools.plans.allocate import Allocation
from tools.plans.layer_profile import LayerProfile, group_layers
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation
from tools.results.schema import Usage

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.instruments.functions import Draft
    from tools.workbench.bench import Workbench


def plan(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Ask the planner for the next round. Raises AgentError (resumable) when it fails and there is no fallback."""
    state = state.model_copy(update={"iteration": state.iteration + 1})
    session = enter("plan", state, runtime)
    with open_bench(state, session) as bench:
        layers = bench.read_profile(state.profile).layers
        after = state.model_copy(update={"evaluated_tokens": state.evaluated_tokens + state.trial_tokens})
        evaluated = Evaluated(state.evaluated_tokens, state.config.max_evaluated_tokens, state.trial_tokens)

        def read_layers(recipe: Recipe) -> list[LayerProfile]:
            return bench.read_layers(state.profile, recipe, session.progress)

        situation = Situation(
            config=state.config,
            layers=layers,
            read_layers=read_layers,
            sparsity=dict(zip(bench.by_name, bench.sparsities(), strict=True)),
            dense=state.dense or _missing("the dense model's trial"),
            accepted=last_accepted(state.trials),
            accepted_plan=state.accepted_plan,
            trials=state.trials,
            lessons=state.lessons,
            iteration=state.iteration,
            is_last=bool(decide_stop(after)),
            find_trial=lambda candidate: find_trial(bench, state, candidate, session.progress),
        )
        if state.replay:
            planner, usage = f"the record of {state.replay}", state.usage
            chosen, stop = find_plan(state, read_layers)
        else:
            toolbox = open_toolbox(bench, situation, state, session, runtime.store, evaluated)
            caps = runtime.context or state.config
            chosen, usage, planner = choose_plan(situation, state.usage, session, caps, toolbox)
            chosen = chosen and apply_lessons(chosen, state.lessons, layers, state.config)
            stop = "every lever of the rule has been tried"
        if chosen:
            layers = read_layers(find_recipe(chosen, state.config))
    if chosen is None:
        session.emit("note", text=stop)
        return {"iteration": state.iteration - 1, "stop": stop, "seconds": session.seconds}
    session.emit(
        "plan",
        iteration=state.iteration,
        planner=planner,
        plan=describe_plan(chosen),
        reason=chosen.reason,
        predicted_kl=allocate_plan(layers, chosen, state.config).predicted_kl,
        details=chosen.model_dump(),
    )
    return {
        "iteration": state.iteration,
        "plan": chosen,
        "usage": usage,
        "evaluated_tokens": evaluated.tokens,
        "seconds": session.seconds,
    }


def find_trial(bench: "Workbench", state: State, plan: Plan, progress: "Progress") -> Trial | None:
    """The last trial that this plan would only repeat: of the same zeros by the same recipe, or refused by a person.

    Nothing is measured. Raises ImpossiblePlan.
    """
    recipe = find_recipe(plan, state.config)
    layers = bench.read_profile(state.profile).layers
    plan = apply_lessons(plan, state.lessons, layers, state.config)
    for trial in reversed(state.trials):
        if trial.verdict == "refuse":
            if trial.plan == describe_plan(plan):
                return trial
            continue
        tried = trial.recipe and trial.recipe.model_copy(update={"pattern": state.config.pattern})
        if tried is None or tried.within_layers() != recipe.within_layers():
            continue
        if recipe.needs_curves and not tried.needs_curves:
            continue  # its KL curves may not be there yet, and are worth no measurement here
        layers = bench.describe_layers(state.profile, recipe, progress)
        if bench.is_made_of(
            trial.checkpoint, state.profile, order_allocation(recipe, allocate_plan(layers, plan, state.config))
        ):
            return trial
    return None


@dataclass
class Evaluated:
    """Tokens that were put through pruned models."""

    tokens: int
    limit: int
    """0 for none."""
    trial: int
    """Those that the trial after it will take."""

    def book(self, tokens: int) -> None:
        """Count those of a probe. Raises ValueError when the trial that follows would go over the limit."""
        left = self.limit - self.tokens - self.trial
        if self.limit and tokens > left:
            raise ValueError(f"a probe of {tokens:,} tokens is too much: {max(left, 0):,} are left beside the trial")
        self.tokens += tokens


def open_toolbox(
    bench: "Workbench",
    situation: Situation,
    state: State,
    session: Session,
    store: BaseStore | None,
    evaluated: Evaluated,
) -> Toolbox | None:
    """The instruments of a chat planner and their budget of this round; None where it has none."""
    config = situation.config
    if config.planner == HEURISTIC or not config.planner_calls:
        return None
    from tools.instruments.agent_tools import make_planner_tools  # torch again, which the workbench has imported by now
    from tools.instruments.functions import Round

    def allocate(layers: Sequence[LayerProfile], draft: "Draft") -> Allocation:
        plan = Plan(sparsity=draft.sparsity, recipe=draft.recipe, adjustments=draft.adjustments)
        return allocate_in_bounds(layers, plan, situation)

    def recall(query: str) -> list[str]:
        return [describe_lesson(lesson) for lesson in search_lessons(store, config, query)] if store else []

    def tell(record: ToolRecord) -> None:
        session.emit("tool", iteration=situation.iteration, **record.model_dump())

    round_ = Round(
        bench=bench,
        profile=state.profile,
        allocate=allocate,
        progress=session.progress,
        pattern=config.pattern,
        present=state.current,
        book=evaluated.book,
        keep=[state.accepted, *(trial.checkpoint for trial in state.trials[-RECENT:])],
        groups={selector: [x.name for x in group] for selector, group in group_layers(situation.layers).items()},
    )
    tools = make_planner_tools(
        round_, history=lambda n: [recount_trial(trial) for trial in situation.trials[-n:]], recall=recall
    )
    return Toolbox(tools, calls=config.planner_calls, seconds=config.planner_seconds, on_tool=tell)


def allocate_in_bounds(layers: Sequence[LayerProfile], plan: Plan, situation: Situation) -> Allocation:
    """The allocation of what a planner says, weighed by the lessons, whatever it says.

    Raises ValueError with a reason for the planner.
    """
    refuse_above_target(plan, situation.config)
    if plan.sparsity < situation.dense.sparsity:
        raise ValueError(
            f"sparsity {plan.sparsity:g} prunes nothing, for more weights are zero already; plan a step towards "
            f"{situation.config.target_sparsity:g}"
        )
    plan = apply_lessons(plan, situation.lessons, situation.layers, situation.config)
    return allocate_plan(layers, plan, situation.config)


class Choice(NamedTuple):
    """A plan, the tokens spent on agents so far, and who made it."""

    plan: Plan | None
    """None when a rule has nothing left to try."""
    usage: Usage
    planner: str


def choose_plan(
    situation: Situation, usage: Usage, session: Session, caps: RunConfig, toolbox: Toolbox | None = None
) -> Choice:
    """The planner's plan, or its fallback's, where it failed or had better be relieved.

    Raises AgentError without a fallback, and CapReached when the agents have spent what `caps` allows.
    """
    config = situation.config
    if config.planner == HEURISTIC:
        return Choice(plan_by_rule(situation), usage, HEURISTIC)
    if config.planner_fallback == HEURISTIC and (reason := find_relief(situation)):
        relief = plan_by_rule(situation)
        if relief is not None:
            session.emit("note", text=f"{reason}: the rule plans this round")
            return Choice(relief, usage, HEURISTIC)
    account = Account("planner", session, usage, config, caps, situation.iteration)

    def check(candidate: Plan) -> None:
        recipe = find_recipe(candidate, config)
        layers = situation.read_layers(recipe) if situation.read_layers else situation.layers
        allocate_in_bounds(layers, candidate, situation)

    try:
        model = open_model(config.planner, config)
        plan = plan_with_chat(
            show_untried(situation),
            model,
            on_call=account.keep_call,
            check=check,
            advise=lambda candidate: advise_against(candidate, situation),
            on_prompt=account.keep_prompt,
            toolbox=toolbox,
        )
    except CapReached:
        raise
    except AgentError as error:
        if config.planner_fallback == "none":
            raise
        session.warn(f"{error}; the fallback planner ({config.planner_fallback}) plans this round")
        return Choice(plan_by_rule(situation), account.usage, HEURISTIC)
    return Choice(plan, account.usage, config.planner)


def show_untried(situation: Situation) -> Situation:
    """The situation with what the rule would try next at the target, for a planner to choose from."""
    if not situation.at_target:
        return situation
    plans = plan_refinements(replace(situation, read_layers=None))  # no text is profiled just to be named here
    return replace(situation, untried=list(islice(plans, MAX_UNTRIED)))


def _missing(what: str) -> Any:
    raise RuntimeError(f"{what} is missing from the state; start the run at its first node")


def after_plan(state: State) -> Literal["approve", "prune", "finish"]:
    """Prune what was planned, once a person has approved it where the config asks for that; finish without a plan."""
    if state.stop:
        return "finish"
    return "approve" if state.config.approve == "plans" else "prune"
