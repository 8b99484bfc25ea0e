"""A workbench of a tiny model: pruned in one line, compared bit by bit, and damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.base.progress import ignore_progress as ignore
from tools.plans.allocate import Allocation, allocate
from tools.plans.recipe import Adjustment, Recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench
from tools.workbench.open import use_workbench

REFIT = Recipe()
MASK = Recipe(method="two-sided", refit=False)
WANDA = Recipe(method="wanda", allocation="uniform", refit=False, statistics="dense")
SEQUENTIAL = Recipe(statistics="sequential")


def open_bench(settings: Any, directory: Path, warn: Callable[[str], None] = pytest.fail) -> Workbench:
    with use_workbench(settings, directory, warn, ignore) as bench:
        return bench


def snapshot(bench: Workbench) -> dict[str, Tensor]:
    """The bits of every parameter and buffer."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return {k: v.view(integers.get(v.dtype, v.dtype)).clone() for k, v in bench.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def plan(bench: Workbench, profile: str, sparsity: float, recipe: Recipe = REFIT, *changes: Adjustment) -> Allocation:
    return allocate(bench.profiles.read(profile).layers, sparsity, recipe, changes, max_layer_sparsity=0.9)


def prune(bench: Workbench, profile: str, sparsity: float, recipe: Recipe = REFIT) -> str:
    return bench.pruner.prune(profile, order_allocation(recipe, plan(bench, profile, sparsity, recipe)), ignore)


def artifact_path(bench: Workbench, checkpoint: str, name: str) -> Path:
    return bench.store.path(bench.pruner.read_checkpoint(checkpoint)[name].artifact, ".safetensors")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x10
    path.write_bytes(content)
