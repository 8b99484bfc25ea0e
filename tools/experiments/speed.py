"""Parts of pruning timed in turn with their references: settings, rounds, and what several benchmarks share."""

import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tools.base.progress import ignore_progress
from tools.base.settings import WorkbenchSettings
from tools.plans.allocate import Allocation, allocate
from tools.plans.recipe import Recipe
from tools.results.speed import Result, compare_rounds
from tools.workbench.bench import Workbench
from tools.workbench.moments import read_moment

SPARSITY = 0.5
"""Share of weights that go, wherever something is pruned."""

OTHER_SPARSITY = 0.4
"""For checkpoints that shall differ from it, in which less goes."""

UPDATED = Recipe(method="sparsegpt", refit=False, allocation="uniform", statistics="dense")
"""The cheapest recipe whose layers are stored as those of a refit: mask and values."""


def _with_default(name: str, value: int) -> Any:
    field = copy(WorkbenchSettings.model_fields[name])
    field.default = value
    return field


class BenchSettings(WorkbenchSettings):
    """The model, its texts, and how often each thing is timed."""

    one_text = "speed is that of one"

    window: int = _with_default("window", 384)
    calibration_windows: int = _with_default("calibration_windows", 12)
    gradient_windows: int = _with_default("gradient_windows", 2)
    validation_windows: int = _with_default("validation_windows", 4)
    test_windows: int = _with_default("test_windows", 1)
    rounds: int = Field(
        3,
        ge=1,
        le=1000,
        description="How often each thing is timed, in turn with its reference, after a first round that warms up.",
    )
    round_seconds: float = Field(
        20.0,
        ge=0,
        description="No further round of a measurement begins after this long; where the first is all there is, it "
        "counts.",
    )
    obs_sizes: list[int] = Field(
        [2048, 4096],
        min_length=1,
        description="Sides of the square layers of the benchmarks masks and obs, comma-separated.",
    )

    @field_validator("obs_sizes", mode="before")
    @classmethod
    def _split_sizes(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("obs_sizes")
    @classmethod
    def _check_sizes(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ValueError("a layer has at least one row and column")
        return value


class Task(NamedTuple):
    """Something to time; `prepare` goes before it each time, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


class Site:
    """The opened workbench, and what several benchmarks need of it."""

    def __init__(self, bench: Workbench, settings: BenchSettings) -> None:
        self.bench, self.settings = bench, settings
        self.calibration_BT = bench.windows.calibration.to(bench.device)

    @cached_property
    def profile(self) -> str:
        """Id of the dense model's profile."""
        return self.bench.profile(ignore_progress)

    def share_out(self, sparsity: float) -> Allocation:
        """The same sparsity in every layer."""
        return allocate(self.bench.read_profile(self.profile).layers, sparsity, UPDATED)

    def read_statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, gamma) of a layer."""
        stored, store = self.bench.read_profile(self.profile), self.bench.store
        moment_II = read_moment(store, stored.moments[stored.group[name]], self.bench.device)
        return moment_II, store.read_tensors(stored.means)[f"plain/{name}"].to(self.bench.device)

    def time(self, *tasks: Task) -> list[list[float]]:
        """The seconds of each task in each round, as `time_in_turn` takes them."""
        return time_in_turn(tasks, self.settings, self._now)

    def _now(self) -> float:
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize(self.bench.device)
        return time.perf_counter()

    def compare(
        self,
        name: str,
        what: str,
        seconds: Sequence[float],
        reference: str,
        reference_seconds: Sequence[float],
        target: float | None = None,
    ) -> Result:
        """The result of two tasks timed in the same rounds."""
        return compare_rounds(name, what, seconds, reference, reference_seconds, target, self.bench.peak_memory_bytes())


def time_in_turn(
    tasks: Sequence[Task], settings: BenchSettings, now: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """The seconds of each task in each round; a round runs all tasks, one after another.

    The first round does not count where others follow: it makes the buffers and starts the threads of the rest.
    """
    seconds: list[list[float]] = [[] for _ in tasks]
    began = time.perf_counter()
    for _ in range(1 + settings.rounds):
        for task, taken in zip(tasks, seconds, strict=True):
            task.prepare()
            start = now()
            task.run()
            taken.append(now() - start)
        if time.perf_counter() - began > settings.round_seconds:
            break
    return [taken[1:] or taken for taken in seconds]
