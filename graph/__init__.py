"""The state machine: state, nodes, edges, agents, memory and the command line."""

import os

import tools as tools  # settles how torch's threads wait, before anything here imports torch

# Read when langgraph is imported: a checkpoint revives our state models and nothing else.
os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
