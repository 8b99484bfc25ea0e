"""What the benchmarks of rollbacks and validations time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from tools.experiments.speed import Site, Task
from tools.experiments.speed_validation import bench_validation
from tools.measure.losses import PrefixCache
from tools.workbench.prune import Pruner


def test_rollbacks_and_validations_change_what_they_say(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[str]] = []
    starts: list[int] = []
    restore, time, replay = Pruner.restore, Site.time, PrefixCache.replay

    def record(pruner: Pruner, checkpoint: str) -> list[str]:
        timed.append(restore(pruner, checkpoint))
        return timed[-1]

    @contextmanager
    def note(cache: PrefixCache, ids_T: Tensor, first: int, window: int) -> Iterator[None]:
        starts.append(first)
        with replay(cache, ids_T, first, window):
            yield

    def clear_first(task: Task) -> Task:
        """Only what is timed remains recorded, until the next preparation."""

        def prepare() -> None:
            task.prepare()
            timed.clear()
            starts.clear()

        def run() -> None:
            task.run()
            seen.append((list(timed), list(starts)))

        return Task(run, prepare)

    seen: list[Any] = []
    monkeypatch.setattr(Pruner, "restore", record)
    monkeypatch.setattr(PrefixCache, "replay", note)
    monkeypatch.setattr(Site, "time", lambda site, *tasks: time(site, *map(clear_first, tasks)))
    bench_validation(site)
    names = [layer.name for layer in site.bench.layers]
    last = [layer.name for layer in site.bench.layers if layer.block == 1]
    windows = len(site.bench.windows.validation)
    # A validation restores its checkpoint, which is there already. Two blocks: the last third begins at block 1.
    round_ = [([], []), ([[]], [1] * windows), ([names], []), ([last], [])]
    assert seen == round_ * (1 + site.settings.rounds)
