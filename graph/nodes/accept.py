"""accept: what is in the model becomes what rollbacks return to."""

from typing import Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.runs.session import enter, open_bench
from graph.state import State


def accept(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Keep the trial; layer artifacts that only older checkpoints need are deleted (they can be made again)."""
    session = enter("accept", state, runtime)
    with open_bench(state, session) as bench:
        bench.pruner.forget(state.model_copy(update={"accepted": state.current}).kept)
        session.emit("accept", iteration=state.iteration, checkpoint=state.current)
    return {
        "accepted": state.current,
        "accepted_plan": state.plan,
        "seconds": session.seconds,
    }
