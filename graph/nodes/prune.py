"""prune: carry the plan out, from the dense weights, and write the checkpoint."""

import time
from typing import Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.nodes.plan import allocate_plan
from graph.session import enter, open_bench
from graph.state import State


def prune(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Allocate and prune; layers that were made before by the same recipe are read back."""
    began = time.monotonic()
    assert state.plan is not None, "the plan node runs first"
    with enter("prune", state, runtime) as session, open_bench(state, session) as bench:
        allocation = allocate_plan(bench.read_profile(state.profile).layers, state.plan, state.config)
        checkpoint = bench.prune(state.profile, allocation, state.plan.recipe, session.progress)
        session.emit(
            "layers",
            checkpoint=checkpoint,
            names=list(bench.by_name),
            blocks=[layer.block for layer in bench.layers],
            kinds=[layer.kind for layer in bench.layers],
            sparsity=[round(s, 6) for s in bench.sparsities()],
        )
    return {"current": checkpoint, "seconds": state.seconds + time.monotonic() - began}
