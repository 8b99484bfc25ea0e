"""reflect: what the trial taught goes to the store; then on to the next round, or to the end."""

from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.agents.reflector import draw_lesson
from graph.config import RunConfig
from graph.memory import write_lesson
from graph.session import enter, open_bench
from graph.state import SAME_SPARSITY, State, last_accepted


def reflect(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Compare the trial's prediction with its measurement, and decide whether the loop goes on."""
    trial = state.trials[-1]
    before = last_accepted(state.trials[:-1])
    session = enter("reflect", state, runtime)
    with open_bench(state, session) as bench:
        layers = bench.read_profile(state.profile).layers
        sparsity = bench.planned_sparsity(trial.checkpoint)
        before_sparsity = bench.planned_sparsity(before.checkpoint if before else "dense")
    lesson = draw_lesson(state.run, layers, trial, sparsity, before, before_sparsity)
    if lesson is not None:
        if runtime.store is not None:
            write_lesson(runtime.store, state.config, lesson)
        session.emit("lesson", **lesson.model_dump())
    stop = decide_stop(state)
    if stop:
        session.emit("note", text=stop)
    return {
        "lessons": [*state.lessons, *([lesson] if lesson else [])],
        "stop": stop,
        "seconds": session.seconds,
    }


def decide_stop(state: State) -> str:
    """Why the loop ends here; empty while it goes on."""
    if state.iteration >= state.config.max_iterations:
        return f"{state.iteration} iterations were asked for and done"
    best = last_accepted(state.trials)
    if best is None or abs(best.sparsity - state.config.target_sparsity) > SAME_SPARSITY:
        return ""
    idle = state.iteration - best.iteration
    if idle >= state.config.patience:
        return f"at the target, {idle} rounds in a row brought no improvement"
    return ""


def after_reflect(state: State) -> Literal["plan", "profile", "finish"]:
    """Another round, with a new profile first where the config or an accepted plan asks for one, or the end."""
    if state.stop:
        return "finish"
    asked = state.config.reprofile or (state.plan is not None and state.plan.reprofile)
    return "profile" if asked and state.trials[-1].verdict == "accept" else "plan"
