"""Workers as a run on Ray has them, with models of their own, but all in this process and without Ray."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch import Tensor

import tools.workbench.losses
from tools.measure.losses import limit_prefix
from tools.models.load import load_model
from tools.models.streamed import find_stream
from tools.statistics.requests import Answers, Here, ShardRequest
from tools.statistics.shards import SHARDS, share_out
from tools.team.carrier import WeightSource, name_weights
from tools.team.requests import Job, OnShards, OnSpan, Shared
from tools.team.worker import KeptPlace, StoredLayer, Texts, Worker
from tools.workbench.bench import Workbench
from tools.workbench.store import DENSE

T = TypeVar("T")


class Team:
    """What `tools.team.cluster.Cluster` is to a workbench. Jobs handed out are done last to first."""

    ahead = 0

    def __init__(
        self,
        settings: Any,
        texts: Texts,
        source: WeightSource,
        model: Any,
        size: int = 2,
        kept_in: Path | None = None,
    ) -> None:
        """Walks of a streamed model are `kept_in` a directory."""
        self.source, self.size, self.shards = source, size, min(SHARDS, len(texts.windows.calibration))
        scratch = Path(tempfile.gettempdir())
        # two copies of a model that is streamed would have one file
        models = [load_model(settings)[0] if find_stream(model) else copy.deepcopy(model) for _ in range(size)]
        keeps = KeptPlace(kept_in, source.hash_all_dense()) if kept_in and find_stream(model) else None
        self.workers = [Worker(own, settings, texts, scratch, limit_prefix(own), keeps) for own in models]
        self.handed: list[tuple[str, int]] = []
        """(name of the request, worker) of every job about weights of its own."""

    def ask(self, request: ShardRequest[T]) -> Answers[T]:
        return self.share(OnShards(request), self.shards)

    def share(self, request: Shared[T], count: int) -> Answers[T]:
        spans = share_out(count, self.size)
        answers = [OnSpan(request, span).run(self._update(place)) for place, span in enumerate(spans)]

        def collect(tick: Callable[[int], None]) -> list[T]:
            tick(count)
            return answers

        return collect

    def hand_out(self, jobs: Iterable[Job[T]], weights: Sequence[Mapping[str, str]] = ()) -> Iterator[tuple[int, T]]:
        for number, job in reversed(list(enumerate(jobs))):
            place = number % self.size
            worker = self._update(place, weights[number] if weights else None)
            if weights:
                self.handed.append((type(job.request if isinstance(job, OnSpan) else job).__name__, place))
            yield number, job.run(worker)

    def hand_out_and_keep(self, jobs: Iterable[Job[T]]) -> Iterator[Here[T]]:
        for _, answer in self.hand_out(jobs):
            yield Here(answer)

    def keep(self, value: T) -> Here[T]:
        return Here(value)

    def keep_dense(self, name: str) -> Here[Tensor]:
        return Here(self.source.dense[name])

    def close(self) -> None:
        """There is nothing to let go."""

    def _update(self, place: int, weights: Mapping[str, str] | None = None) -> Worker:
        wanted = self.source.installed if weights is None else weights
        found = {
            name: Here(
                StoredLayer(
                    {} if artifact == DENSE else self.source.read_artifact(name, artifact), self.keep_dense(name)
                )
            )
            for name, artifact in wanted.items()
        }
        self.workers[place].install(name_weights(wanted), found, self.source.mark_blocks(wanted))
        return self.workers[place]


def make_team(bench: Workbench, size: int = 2) -> Team:
    """A team for a workbench that does its work alone."""
    return Team(bench.settings, Texts(bench.windows, bench.questions), bench.weights, bench.model, size)


def join_team(bench: Workbench) -> Team:
    """From now on a workbench has the workers of a `Team`, which is given."""
    team = make_team(bench)
    bench.crew.cluster = bench.crew.team = team  # type: ignore[assignment]
    return team


def gather_teams(monkeypatch: pytest.MonkeyPatch) -> list[Team]:
    """From now on workbenches with workers have a `Team`; those that were gathered."""
    teams: list[Team] = []

    def gather(
        settings: Any, texts: Texts, source: WeightSource, model: Any, scratch: Path, _warn: Callable[[str], None]
    ) -> Team:
        teams.append(Team(settings, texts, source, model, kept_in=scratch))
        return teams[-1]

    monkeypatch.setattr(tools.workbench.losses, "Cluster", gather)
    return teams
