"""Structured pruning: whole parts of the model go."""
