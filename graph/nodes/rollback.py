"""rollback: the last accepted weights again, bit for bit, touching only the layers that differ."""

import time
from typing import Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.session import enter, open_bench
from graph.state import State


def rollback(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Restore the last accepted checkpoint."""
    began = time.monotonic()
    with enter("rollback", state, runtime) as session, open_bench(state, session) as bench:
        changed = bench.restore(state.accepted)
        session.emit("rollback", iteration=state.iteration, checkpoint=state.accepted, layers=len(changed))
        session.emit(
            "layers",
            checkpoint=state.accepted,
            names=list(bench.by_name),
            blocks=[layer.block for layer in bench.layers],
            kinds=[layer.kind for layer in bench.layers],
            sparsity=[round(s, 6) for s in bench.sparsities()],
        )
    return {"current": state.accepted, "seconds": state.seconds + time.monotonic() - began}
