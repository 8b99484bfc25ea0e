"""rollback: the last accepted weights again, bit for bit, touching only the layers that differ."""

from typing import Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.runs.session import enter, open_bench, tell_layers
from graph.state import State


def rollback(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Restore the last accepted checkpoint; layer artifacts that only older ones need are deleted, as by accept."""
    session = enter("rollback", state, runtime)
    with open_bench(state, session) as bench:
        changed = bench.pruner.restore(state.accepted)
        bench.pruner.forget(state.kept)
        session.emit("rollback", iteration=state.iteration, checkpoint=state.accepted, layers=len(changed))
        tell_layers(session, bench, state.accepted)
    return {"current": state.accepted, "seconds": session.seconds}
