"""One file per node: read the state, call tools, return an update."""
