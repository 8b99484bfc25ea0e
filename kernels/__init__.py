"""Tensor functions: statistics, scores, masks, updates, packing; knows no model, config or file."""
