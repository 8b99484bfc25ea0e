"""What runs leave for the next ones in the store. `python -m graph.memory` looks into it."""
