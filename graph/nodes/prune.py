"""prune: carry the plan's work order out, from the dense weights, and write the checkpoint."""

from typing import Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.orders import find_order
from graph.runs.session import enter, open_bench, tell_layers
from graph.state import State


def prune(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Prune by the order; layers that were made before by the same recipe are read back."""
    session = enter("prune", state, runtime)
    with open_bench(state, session) as bench:
        order = find_order(bench, state, session.progress)
        checkpoint = bench.prune(state.profile, order, session.progress)
        tell_layers(session, bench, checkpoint)
    return {"current": checkpoint, "seconds": session.seconds}
