"""`python -m tools.ablate` has another name: it starts runs of the graph."""

import sys

if __name__ == "__main__":
    print("python -m tools.ablate is now: python -m graph.ablate, with the same flags", file=sys.stderr)
    sys.exit(2)
