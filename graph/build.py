"""The wiring of the graph, as in the picture; nothing else.

profile → (brief) → plan → (approve) → prune → validate ─┬─ accept ───┐
   ↑                  ↑                                  └─ rollback ─┤
   └──────────────────┴────────────────── reflect ←───────────────────┘ → finish

A plan that breaks before there is anything to validate goes straight to rollback.
"""

from collections.abc import Callable
from typing import Any

from langgraph.graph import END, START, StateGraph

from graph.config import RunConfig
from graph.nodes.accept import accept
from graph.nodes.approve import after_approve, approve
from graph.nodes.brief import brief
from graph.nodes.finish import finish
from graph.nodes.plan import after_plan, plan
from graph.nodes.profile import after_profile, profile
from graph.nodes.prune import after_prune, prune
from graph.nodes.reflect import after_reflect, reflect
from graph.nodes.rollback import rollback
from graph.nodes.validate import after_validate, validate
from graph.runs.steps import step, step_of_server
from graph.state import Input, State


def builder(*, server: bool = False) -> StateGraph[State, RunConfig, Input, State]:
    """Nodes and edges; whoever runs the graph compiles it with a checkpointer and a store.

    For Studio's `server` the nodes are coroutines, so that a run can be cancelled in the middle of one.
    """
    graph = StateGraph(State, input_schema=Input, context_schema=RunConfig)
    for node in (profile, brief, plan, approve, prune, validate, accept, rollback, reflect, finish):
        description = (node.__doc__ or "").splitlines()[0]
        work: Any = step_of_server(node) if server else step(node)
        graph.add_node(node.__name__, work, metadata={"description": description})
    graph.add_edge(START, "profile")
    graph.add_conditional_edges("profile", after_profile)
    graph.add_conditional_edges("brief", go_on_to("plan"), ["plan"])
    graph.add_conditional_edges("plan", after_plan)
    graph.add_conditional_edges("approve", after_approve)
    graph.add_conditional_edges("prune", after_prune)
    graph.add_conditional_edges("validate", after_validate)
    graph.add_conditional_edges("accept", go_on_to("reflect"), ["reflect"])
    graph.add_conditional_edges("rollback", go_on_to("reflect"), ["reflect"])
    graph.add_conditional_edges("reflect", after_reflect)
    graph.add_edge("finish", END)
    return graph


def go_on_to(node: str) -> Callable[[State], str]:
    """An edge that has one end, but reads the state: so a person's edit of it that cannot be is refused at once.

    Later LangGraph could not even show a run with it.
    """

    def go_on(state: State) -> str:
        return node

    return go_on


graph = builder(server=True)
"""For `langgraph dev`, which compiles it with savers of its own (see langgraph.json)."""
