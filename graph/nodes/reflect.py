"""reflect: what the trial taught goes to the store; then on to the next round, or to the end."""

from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.llm.ask import AgentError
from graph.llm.models import HEURISTIC, open_model
from graph.llm.spending import Account, CapReached
from graph.memory.store import write_lesson
from graph.planning.orders import find_recipe
from graph.planning.rule import STRONG, tried_strongest
from graph.reflecting.brief import Evidence, combine_lessons, draw_lesson, reflect_with_chat
from graph.reflecting.lessons import CARRIED, merge_lessons
from graph.runs.replay import find_reflection
from graph.runs.session import Session, enter, open_bench
from graph.state import Reflection, State, Trial, last_accepted, same_sparsity
from tools.results.schema import Usage


def reflect(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Compare the trial's prediction with its measurement, and decide whether the loop goes on.

    Raises AgentError (resumable) when the reflector fails and there is no fallback.
    """
    session = enter("reflect", state, runtime)
    evidence = gather_evidence(state, session)
    if state.replay:
        reflection, usage = find_reflection(state.replay, state.iteration), state.usage
        session.record("reflection", iteration=state.iteration, details=reflection.model_dump())
    else:
        reflection, usage = choose_reflection(evidence, state.usage, session, runtime.context or state.config)
    lessons = combine_lessons(evidence, reflection)
    for number, lesson in enumerate(lessons):
        if runtime.store is not None and state.config.memory and not state.replay:  # it was learnt there already
            write_lesson(runtime.store, state.config, lesson, number)
        session.emit("lesson", **lesson.model_dump())
    stop = decide_stop(state)
    reason = " ".join(reflection.reason.split()) or "no reason given"
    if reflection.stop and not stop:
        if early := find_early(state):
            session.emit("note", text=f"the reflector would stop, but {early}: {reason}")
        else:
            stop = f"at the target, the reflector stops: {reason}"
    if reflection.reprofile and not stop and state.trials[-1].verdict == "accept":
        session.emit("note", text=f"the reflector asks for a new profile: {reason}")
    if stop:
        session.emit("note", text=stop)
    return {
        "lessons": merge_lessons([*state.lessons, *lessons])[-CARRIED:],
        "reprofile": reflection.reprofile,
        "usage": usage,
        "stop": stop,
        "seconds": session.seconds,
    }


def gather_evidence(state: State, session: Session) -> Evidence:
    """What the last trial was, and what the rule makes of it."""
    assert state.plan is not None and state.dense is not None, "plan and profile run first"
    trial, before = state.trials[-1], last_accepted(state.trials[:-1])
    recipe = find_recipe(state.plan, state.config)
    with open_bench(state, session) as bench:
        layers = bench.describe_layers(state.profile, recipe, session.progress)
        sparsity = bench.planned_sparsity(trial.checkpoint)
        before_sparsity = bench.planned_sparsity(before.checkpoint if before else "dense")
    return Evidence(
        config=state.config,
        run=state.run,
        layers=layers,
        recipe=recipe,
        plan=state.plan,
        trial=trial,
        sparsity=sparsity,
        dense=state.dense,
        before=before,
        before_sparsity=before_sparsity,
        trials=state.trials[:-1],
        lessons=state.lessons,
        measured=draw_lesson(state.run, layers, trial, sparsity, before, before_sparsity),
    )


def choose_reflection(evidence: Evidence, usage: Usage, session: Session, caps: RunConfig) -> tuple[Reflection, Usage]:
    """What the reflector's model makes of the trial, nothing where there is none, and the tokens spent so far.

    Raises AgentError without a fallback, and CapReached when the agents have spent what `caps` allows.
    """
    config, iteration = evidence.config, evidence.trial.iteration
    if config.reflector == HEURISTIC:
        return Reflection(), usage
    account = Account("reflector", session, usage, config, caps, iteration)
    try:
        model = open_model(config.reflector, config)
        reflection = reflect_with_chat(evidence, model, on_call=account.keep_call, on_prompt=account.keep_prompt)
    except CapReached:
        raise
    except AgentError as error:
        if config.planner_fallback == "none":
            raise
        session.warn(f"{error}; the rule alone reflects on this round")
        return Reflection(), account.usage
    session.record("reflection", iteration=iteration, reflector=config.reflector, details=reflection.model_dump())
    return reflection, account.usage


def decide_stop(state: State) -> str:
    """Why the loop ends here; empty while it goes on."""
    if state.iteration >= state.config.max_iterations:
        return f"{state.iteration} iterations were asked for and done"
    limit = state.config.max_evaluated_tokens
    if limit and state.evaluated_tokens + state.trial_tokens > limit:
        return f"{state.evaluated_tokens:,} of at most {limit:,} tokens were evaluated, and another trial takes more"
    best = _find_best_at_target(state)
    idle = state.iteration - best.iteration if best else 0
    if idle >= state.config.patience:
        return f"at the target, {idle} rounds in a row brought no improvement"
    return ""


def find_early(state: State) -> str:
    """Why it is too early for a reflector to end the loop; empty where it is not."""
    best = _find_best_at_target(state)
    if best is None:
        return "the target is not reached yet"
    if state.config.planner_fallback == "none":
        return ""
    if not tried_strongest(state.trials, state.config):
        return f"{STRONG.method} has not been tried at the target"
    return "the last round was an improvement" if best is state.trials[-1] else ""


def _find_best_at_target(state: State) -> Trial | None:
    best = last_accepted(state.trials)
    return best if best and same_sparsity(best.sparsity, state.config.target_sparsity) else None


def after_reflect(state: State) -> Literal["plan", "profile", "finish"]:
    """Another round, with a new profile first where config, accepted plan or reflector ask for one, or the end."""
    if state.stop:
        return "finish"
    asked = state.config.reprofile or state.reprofile or (state.plan is not None and state.plan.reprofile)
    return "profile" if asked and state.trials[-1].verdict == "accept" else "plan"
