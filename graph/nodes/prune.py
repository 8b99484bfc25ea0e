"""prune: carry the plan out, from the dense weights, and write the checkpoint."""

from typing import Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.orders import allocate_plan, find_recipe
from graph.runs.session import enter, open_bench, tell_layers
from graph.state import State
from tools.plans.work_order import order_allocation


def prune(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Allocate and prune; layers that were made before by the same recipe are read back."""
    assert state.plan is not None, "the plan node runs first"
    session = enter("prune", state, runtime)
    with open_bench(state, session) as bench:
        recipe = find_recipe(state.plan, state.config)
        layers = bench.describe_layers(state.profile, recipe, session.progress)
        allocation = allocate_plan(layers, state.plan, state.config)
        checkpoint = bench.prune(state.profile, order_allocation(recipe, allocation), session.progress)
        tell_layers(session, bench, checkpoint)
    return {"current": checkpoint, "seconds": session.seconds}
