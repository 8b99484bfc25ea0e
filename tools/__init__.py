"""Everything done to the model, as plain typed functions; knows no graph and no agent."""

import os

import kernels as kernels  # settles how torch's threads wait, before anything here imports torch

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; Billhook draws its own progress
