"""The state machine: state, nodes, edges, agents, memory and the command line."""

import os

# Read when langgraph is imported: a checkpoint revives our state models and nothing else.
os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
