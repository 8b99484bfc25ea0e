"""Everything done to the model, as plain typed functions; knows no graph and no agent."""

import os

from tools.base.parts import check_parts

check_parts()

import billhook_kernels as billhook_kernels  # noqa: E402 — settles how torch's threads wait, before torch is imported

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; Billhook draws its own progress
