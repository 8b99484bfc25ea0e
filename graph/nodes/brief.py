"""brief: the goal in words becomes what each text counts and may lose; fixed for the run.

A person may be asked (`--approve goal`): the node then interrupts the graph, as `approve` does.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from langgraph.runtime import Runtime

from graph.config import HEURISTIC, RunConfig
from graph.goals.choose import SHOWN, Sight, ask_person, choose_brief, describe_rule
from graph.goals.schema import check_brief, follow_brief, keep_bounds
from graph.nodes.profile import find_cut, measure_dense, profile_model
from graph.planning.orders import resolve
from graph.planning.plan import Plan
from graph.runs.replay import find_brief
from graph.runs.session import enter, open_bench
from graph.state import State
from tools.base.errors import UserError
from tools.plans.layer_profile import predict_kl

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench
    from tools.workbench.unfinished import StoredProfile


def brief(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Turn the goal into weights, bounds and texts, and see how the dense model does by them."""
    session = enter("brief", state, runtime)
    usage = state.usage
    if state.replay:
        chosen, by = find_brief(state.replay), f"the record of {state.replay}"
    else:
        with open_bench(state, session) as bench:
            texts = look_at_texts(bench, state)
        chosen, usage, by = choose_brief(state.config, texts, usage, session, runtime.context or state.config)
        chosen = keep_bounds(chosen, state.config)
        if state.config.approves_goal:
            chosen, edited = ask_person(chosen, state.config)
            by = "you" if edited else by
        if by == HEURISTIC:
            session.emit("note", text=f"the rule reads no words: {describe_rule(state.config)}")
    try:
        check_brief(chosen, state.config)
    except ValueError as error:  # of a record, for a replay with other texts
        raise UserError(f"what was made of the goal cannot be followed: {error}") from error
    config = follow_brief(state.config, chosen)
    session.emit("brief", planner=by, line=chosen.line, details=chosen.model_dump())
    state = state.model_copy(update={"config": config, "brief": chosen})
    with open_bench(state, session) as bench:
        target = find_cut(bench, state, session) if config.takes_parts else None
        profile = profile_model(bench, target, session)
        parts = bench.cuts.measure(profile, target, session.progress) if target else ""
        dense = measure_dense(bench, state, profile, session)
        session.emit("trial", **dense.model_dump())
    update = {"config": config, "brief": chosen, "profile": profile, "parts": parts, "dense": dense, "usage": usage}
    return {**update, "seconds": session.seconds}


def look_at_texts(bench: "Workbench", state: State) -> list[Sight]:
    """Each named text as the planner sees it: its first words, how the dense model does on it, and what its own KL
    curves say of the target, shared out by the present weights of texts; a run that takes parts has no such curves."""
    assert state.dense is not None, "profile runs first"
    known = {figures.name: figures.perplexity for figures in state.dense.texts}
    lead, first = bench.windows.lead, bench.windows.list_each("calibration", range(1))
    predicted = (
        {} if state.config.takes_parts else _predict_kl_of_each(bench.profiles.read(state.profile), state.config)
    )
    sights = []
    for name, window in zip(state.config.text, first, strict=True):
        ids_T = bench.windows.calibration[window, lead : lead + SHOWN]  # a token is a character or more
        begins = bench.tokenizer.decode(ids_T.tolist())
        sights.append(Sight(name, begins, known.get(name), predicted.get(name)))
    return sights


def _predict_kl_of_each(stored: "StoredProfile", config: RunConfig) -> dict[str, float]:
    """By the own KL curves of each named text, at the target."""
    zeros = resolve(Plan(sparsity=config.target_sparsity), stored.layers, config).zeros
    shares = np.array([zeros[layer.name] / layer.weights for layer in stored.layers])
    return {
        name: predict_kl(
            [layer.model_copy(update={"kappa": part.kappa[layer.name]}) for layer in stored.layers], shares
        )
        for name, part in stored.parts.items()
    }
