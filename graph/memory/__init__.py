"""Lessons in the store. `python -m graph.memory` looks into them."""
