"""plan: the agent decides the next round; its plan is checked before anything is pruned."""

from typing import TYPE_CHECKING, Any, Literal

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.choose import choose_plan
from graph.planning.orders import allocate_plan, apply_lessons, describe_plan, find_recipe
from graph.planning.plan import Plan
from graph.planning.situation import Situation
from graph.planning.toolbox import Evaluated, open_toolbox
from graph.planning.verdict import decide_stop
from graph.runs.replay import find_plan
from graph.runs.session import enter, open_bench
from graph.state import State, Trial, last_accepted
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation

if TYPE_CHECKING:
    from tools.base.progress import Progress
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


def _missing(what: str) -> Any:
    raise RuntimeError(f"{what} is missing from the state; start the run at its first node")


def after_plan(state: State) -> Literal["approve", "prune", "finish"]:
    """Prune what was planned, once a person has approved it where the config asks for that; finish without a plan."""
    if state.stop:
        return "finish"
    return "approve" if state.config.approve == "plans" else "prune"
