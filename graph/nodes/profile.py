"""profile: statistics and KL curves of every layer, and the dense model's losses."""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.llm.models import check_agents
from graph.memory.experience import read_experience
from graph.memory.lessons import read_lessons
from graph.memory.notes import read_notes
from graph.planning.orders import refuse_impossible_target
from graph.reflecting.schema import Experience, Lesson, Note
from graph.runs.directory import check_input, create_run
from graph.runs.replay import read_target
from graph.runs.session import Session, enter, open_bench
from graph.state import State
from tools.base.errors import BrokenBaseline, UnknownStatistics, UserError
from tools.base.rundir import runs_directory
from tools.base.settings import NO_STREAMED_POLISH
from tools.measure.recall import list_texts
from tools.plans.costs import count_profile
from tools.plans.cuts import Target
from tools.plans.layer_profile import LayerProfile, predict_layer_kl
from tools.results.trial import Trial

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench


def profile(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Profile the model; at the start of a run make its directory and read what earlier runs learnt about it."""
    return _profile_again(state, runtime) if state.profile else _profile_first(state, runtime)


def _profile_first(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    from tools.statistics.table import list_shapes  # imports torch

    config = state.config
    thread = (runtime.execution_info.thread_id if runtime.execution_info else None) or str(uuid.uuid4())
    name = state.run or f"studio-{thread[:8]}"
    if not state.replay:
        check_agents(config)
    check_input(config)  # a run that was not started from the command line has not been looked at
    create_run(runs_directory(), name, config, thread, state.replay)
    state = state.model_copy(update={"run": name})
    session = enter("profile", state, runtime)
    with open_bench(state, session) as bench:
        refuse_streamed_polish(bench, config)
        target = find_cut(bench, state, session) if config.takes_parts else None
        if target:
            config = config.model_copy(update={"target_sparsity": target.share})
        lessons: list[Lesson] = []
        experience: list[Experience] = []
        notes: list[Note] = []
        if runtime.store is not None and config.memory and not state.replay:
            notes = read_notes(runtime.store, config, name)
            if target is None:
                lessons, runs = read_lessons(runtime.store, config, name)
                experience = read_experience(runtime.store, config, name)
            if lessons:
                session.emit("lessons", count=len(lessons), runs=runs)
        if target is None:
            refuse_impossible_target(
                list_shapes(bench.weights.layers, bench.weights.dense), config
            )  # hours before the rest is known
        profile_id = profile_model(bench, target, session)
        stored = bench.profiles.read(profile_id)
        # with a goal they are measured by what is made of it
        parts = bench.cuts.measure(profile_id, target, session.progress) if target and not config.goal else ""
        if target is None:
            refuse_impossible_target(stored.layers, config)
        dense = measure_dense(bench, state, profile_id, session)
        _tell_profile(session, profile_id, stored.layers, config)
        if not config.goal:  # which may yet change what the figures are means of
            session.emit("trial", **dense.model_dump())
    return {
        "run": name,
        "config": config,
        "profile": profile_id,
        "parts": parts,
        "dense": dense,
        "lessons": lessons,
        "experience": experience,
        "notes": notes,
        "seconds": session.seconds,
    }


def refuse_streamed_polish(bench: "Workbench", config: RunConfig) -> None:
    """What options say of `--device stream`, of a model that `auto` streams. Raises UserError."""
    if config.polish_tokens and any(layer.is_streamed for layer in bench.weights.layers):
        raise UserError(f"polish_tokens: {NO_STREAMED_POLISH}; leave it out, or give the model more memory")


def find_cut(bench: "Workbench", state: State, session: Session) -> Target:
    """What the run's size comes to; of a replay, what it came to in the record.

    Raises UserError where such a cut cannot be.
    """
    from tools.surgery import share  # imports torch

    found = read_target(state.replay) if state.replay else None
    if found is None:
        config = state.config
        found = share.find_target(bench.model, config.target_size, config.align)
    session.record("target", **found.model_dump())
    return found


def profile_model(bench: "Workbench", target: Target | None, session: Session) -> str:
    """The profile of the model in the workbench; of a run that takes parts away, to its `target`, a bare one."""
    return bench.profiles.make_bare(session.progress) if target else bench.profile(session.progress)


def measure_dense(bench: "Workbench", state: State, profile: str, session: Session) -> Trial:
    """The dense model as a trial: what all others are compared with."""
    config = state.config
    losses = bench.profiles.read(profile).dense
    asked = bench.evaluator.ask("dense", "validation", session.progress).tokens if config.questions else 0
    zeros, weights = bench.weights.count_zeros()
    return Trial(
        iteration=0,
        checkpoint=state.current,
        sparsity=0.0 if config.takes_parts else zeros / weights,  # single zeros are no part that is gone
        perplexity=losses.perplexity,
        kl=0.0,
        kl_error=0.0,
        texts=list_texts(losses),
        predicted_kl=0.0,
        fact_retention=1.0 if config.questions else None,
        fact_error=0.0 if config.questions else None,
        tokens=config.validation_tokens + asked,
        verdict="accept",
        reason="the dense model",
        plan="dense",
        seconds=round(session.elapsed, 3),
    )


def _profile_again(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    session = enter("profile", state, runtime)
    tokens = state.evaluated_tokens + count_profile(state.config)
    with open_bench(state, session) as bench:
        try:
            profile_id = bench.profile(session.progress, first=state.profile)
        except (BrokenBaseline, UnknownStatistics) as error:
            session.warn(f"{error}; the profile stays that of before")
            return {"evaluated_tokens": tokens, "seconds": session.seconds}
        _tell_profile(session, profile_id, bench.profiles.read(profile_id).layers, state.config)
    return {"profile": profile_id, "evaluated_tokens": tokens, "seconds": session.seconds}


def _tell_profile(session: Session, profile_id: str, layers: Sequence[LayerProfile], config: RunConfig) -> None:
    target, weights = np.array([config.target_sparsity]), sum(layer.weights for layer in layers)
    of_layers = [] if config.takes_parts else layers  # whose parts have curves of their own
    costs = sorted(
        ((layer.name, float(predict_layer_kl(layer, target)[0])) for layer in of_layers), key=lambda c: -c[1]
    )
    session.emit("profile", profile=profile_id, layers=len(layers), weights=weights, top=costs[:5])


def after_profile(state: State) -> Literal["brief", "plan"]:
    """Make something of the goal first, where there is one and that was not done."""
    return "brief" if state.config.goal and state.brief is None else "plan"
