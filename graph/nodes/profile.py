"""profile: statistics and KL curves of every layer, and the dense model's losses; once per run."""

import time
import uuid
from typing import Any

import numpy as np
from langgraph.runtime import Runtime

from graph.agents.chat import check_planner
from graph.config import RunConfig
from graph.memory import read_lessons
from graph.persistence import runs_directory
from graph.session import create_run, enter, open_bench
from graph.state import State, Trial
from tools.curves import predict_layer_kl


def profile(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Make the run's directory if need be, profile the model, and read what earlier runs learnt about it."""
    began = time.monotonic()
    # The library hands over None where the caller gave no context, although every field has a default.
    config = runtime.context or RunConfig()
    thread = (runtime.execution_info.thread_id if runtime.execution_info else None) or str(uuid.uuid4())
    name = state.run or f"studio-{thread[:8]}"
    check_planner(config.planner)
    create_run(runs_directory(), name, config, thread)
    state = state.model_copy(update={"run": name, "config": config})
    with enter("profile", state, runtime) as session, open_bench(state, session) as bench:
        lessons = read_lessons(runtime.store, config, name) if runtime.store else []
        if lessons:
            session.emit("lessons", count=len(lessons), runs=len({lesson.run for lesson in lessons}))
        profile_id = bench.profile(session.progress)
        stored = bench.read_profile(profile_id)
        zeros, weights = bench.count_zeros()
        dense = Trial(
            iteration=0,
            checkpoint=state.current,
            sparsity=zeros / weights,
            perplexity=stored.dense.perplexity,
            kl=0.0,
            kl_error=0.0,
            predicted_kl=0.0,
            verdict="accept",
            reason="the dense model",
            plan="dense",
            seconds=time.monotonic() - began,
        )
        target = np.array([config.target_sparsity])
        levels = [(layer.name, float(predict_layer_kl(layer, target)[0])) for layer in stored.layers]
        top = sorted(levels, key=lambda pair: -pair[1])[:5]
        session.emit("profile", profile=profile_id, layers=len(stored.layers), weights=weights, top=top)
        session.emit("trial", **dense.model_dump())
    return {
        "run": name,
        "config": config,
        "profile": profile_id,
        "dense": dense,
        "lessons": lessons,
        "seconds": state.seconds + time.monotonic() - began,
    }
