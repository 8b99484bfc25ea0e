"""Workers as a run on Ray has them, with models of their own, but all in this process and without Ray."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from tools.statistics.shards import SHARDS, Answers, share_out
from tools.team.worker import Texts, Worker
from tools.workbench.bench import DENSE, Workbench


class Team:
    """What `tools.team.cluster.Cluster` is to a workbench. Jobs handed out are done last to first."""

    ahead = 0

    def __init__(self, bench: Workbench, size: int = 2) -> None:
        texts = Texts(bench.windows, bench.questions)
        self.bench, self.size = bench, size
        self.workers = [
            Worker(copy.deepcopy(bench.model), bench.settings, texts, bench.directory, 10**6) for _ in range(size)
        ]
        self.handed: list[tuple[str, int]] = []
        """(method, worker) of every job about weights of its own."""

    def ask(self, method: str, *arguments: Any) -> Answers:
        return self.share(method, min(SHARDS, len(self.bench.windows.calibration)), *arguments)

    def share(self, method: str, count: int, *arguments: Any) -> Answers:
        spans = share_out(count, self.size)
        answers = [getattr(self._update(i), method)(span, *arguments) for i, span in enumerate(spans)]

        def collect(tick: Callable[[int], None]) -> list[Any]:
            tick(count)
            return answers

        return collect

    def hand_out(
        self,
        method: str,
        jobs: Iterable[tuple[Any, ...]],
        weights: Sequence[Mapping[str, str]] = (),
        *,
        keeps: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        for number, job in reversed(list(enumerate(jobs))):
            place = number % self.size
            worker = self._update(place, weights[number] if weights else None)
            if weights:
                self.handed.append((method, place))
            yield number, getattr(worker, method)(*job)

    def keep(self, value: Any) -> Any:
        return value

    def keep_dense(self, name: str, weight_OI: Tensor) -> Any:
        return weight_OI

    def close(self) -> None:
        """There is nothing to let go."""

    def _update(self, place: int, weights: Mapping[str, str] | None = None) -> Worker:
        wanted = self.bench.installed if weights is None else weights
        found = {
            name: {"dense": self.bench.dense[name]}
            | ({} if artifact == DENSE else self.bench.read_artifact(name, artifact))
            for name, artifact in wanted.items()
        }
        self.workers[place].install(found, self.bench.mark_blocks(wanted))
        return self.workers[place]


def gather_teams(monkeypatch: pytest.MonkeyPatch) -> list[Team]:
    """From now on workbenches with workers have a `Team`; those that were gathered."""
    teams: list[Team] = []

    def gather(bench: Workbench) -> Team:
        teams.append(Team(bench))
        return teams[-1]

    monkeypatch.setattr(Workbench, "_gather_workers", gather)
    return teams
