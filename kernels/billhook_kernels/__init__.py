"""Tensor functions: statistics, scores, masks, updates, packing; knows no model, config or file."""

import os

# Read when torch loads OpenMP. By default its idle threads spin, and on a machine that does anything else beside,
# every small parallel step then waits for a spinning thread's time slice.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Read at MKL's first product: products are then the same bits on any number of threads, at the same speed.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
