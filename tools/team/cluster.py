"""The team of a run on Ray: one worker for each device, on this machine or on a cluster that is there already.

Workers hold a model each; of what is pruned, only layers that changed travel, through Ray's object store and once for
all who need them. What a worker answers depends on nothing but the request and the weights, whose name comes with every
answer, so that the work of one that died, or has other weights, is simply asked for again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tools.base.progress import Warn
from tools.base.settings import TeamSettings, count_beside
from tools.models.streamed import find_stream
from tools.statistics.requests import Answers, ShardRequest
from tools.statistics.shards import SHARDS, Span, share_out
from tools.team.carrier import Carrier, Weights, WeightSource
from tools.team.connection import connect, count_workers
from tools.team.places import Place, Places, Reference, keep, thaw
from tools.team.requests import Job, OnShards, Shared
from tools.team.worker import KeptPlace, Texts, identify

T = TypeVar("T")


@dataclass
class _Call:
    """A request on its way to one worker."""

    request: Any
    """Ray's reference to it, frozen."""
    span: Span | None
    """The part of it that is asked for; None for a job."""
    place: Place
    weights: Weights | None = None
    """Those that the worker is to have; None for those in this process, whatever they are when it is sent."""
    keeps: bool = False
    """Whether the answer stays in the object store."""
    actor: Any = None
    expected: str = ""
    """The name of the weights that the worker then has."""
    answer: Any = None
    """A reference to the name of the weights that it had, and to the answer where that is not kept."""
    kept: Any = None


class Cluster:
    """The workers of one run. Raises UserError when they cannot be had."""

    ahead = 1

    def __init__(
        self, settings: TeamSettings, texts: Texts, source: WeightSource, model: Any, scratch: Path, warn: Warn
    ) -> None:
        """`model` is this process' own, as it was loaded; workers hold theirs whole or stream them as this one is.

        Workers on this machine have files without a name in the directory `scratch`, where they keep how far their
        walks of a streamed model have come. Those of a cluster may not reach it: their files lie where their system has
        its own for a while, and they keep nothing.
        """
        self._shards = min(SHARDS, len(texts.windows.calibration))
        identity, device, written = identify(model), model.device.type, 0
        if find_stream(model):
            settings = settings.model_copy(update={"device": "stream"})  # which auto may stand for
            written = sum(parameter.nbytes for parameter in model.parameters())
        reached = scratch if count_beside(settings) else None
        keeps = KeptPlace(scratch, source.hash_all_dense()) if reached and written else None
        self._connection = connect(settings)
        self._ray = self._connection.ray
        self._carrier = Carrier(self._ray, source)
        self._places = Places(self._connection, settings, identity, device, reached, warn, keeps)
        try:
            self._places.open(count_workers(self._connection, settings, device), texts, written)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._places.used)

    def use(self, count: int) -> None:
        """From now on only the first so many workers have work, to measure what more of them bring."""
        self._places.use(count)

    def close(self) -> None:
        """Let the workers go, and Ray where it was begun here."""
        self._places.close()
        self._connection.close()

    def ask(self, request: ShardRequest[T]) -> Answers[T]:
        """Begin with a request to every worker, each about its span of the shards."""
        return self.share(OnShards(request), self._shards)

    def share(self, request: Shared[T], count: int) -> Answers[T]:
        """As `ask`, about any `count` items."""
        given, spans = self.keep(request).ref, share_out(count, self.size)
        calls = [self._send(_Call(given, span, place)) for span, place in zip(spans, self._places.used, strict=False)]

        def collect(tick: Callable[[int], None]) -> list[T]:
            answers = []
            for call, span in zip(calls, spans, strict=True):
                answers.append(self._receive(call))
                tick(span[1] - span[0])
            return answers

        return collect

    def hand_out(self, jobs: Iterable[Job[T]], weights: Sequence[Weights] = ()) -> Iterator[tuple[int, T]]:
        """(number of a job, its answer), in the order in which they are done, by whoever is free.

        With `weights` each job is about its own, else all are about those in this process. No more jobs are drawn than
        the workers have in hand and in line. Raises DamagedArtifact.
        """
        return self._hand_out(jobs, weights, keeps=False)

    def hand_out_and_keep(self, jobs: Iterable[Job[T]]) -> Iterator[Reference[T]]:
        """As `hand_out`, of answers that stay in the object store."""
        for _, kept in self._hand_out(jobs, (), keeps=True):
            yield Reference(kept)

    def _hand_out(
        self, jobs: Iterable[Job[Any]], weights: Sequence[Weights], *, keeps: bool
    ) -> Iterator[tuple[int, Any]]:
        waiting = enumerate(jobs)
        running: dict[Any, tuple[int, _Call]] = {}
        coming = self._carrier.coming = list(reversed(weights))

        def give(place: Place) -> None:
            for number, job in islice(waiting, 1):
                own = coming.pop() if weights else None
                call = self._send(_Call(self.keep(job).ref, None, place, own, keeps))
                running[call.answer] = number, call

        try:
            for place in [*self._places.used, *self._places.used]:  # one to work on, and one in line
                give(place)
            while running:
                with self._connection.explained():
                    done = self._connection.wait(list(running))
                number, call = running.pop(done)
                answer = self._receive(call)
                give(call.place)
                yield number, answer
        finally:
            self._carrier.coming = []

    def keep(self, value: T) -> Reference[T]:
        """A value put where all workers can read it: to stand for it in several requests."""
        return keep(self._ray, value)

    def keep_dense(self, name: str) -> Reference[Tensor]:
        """As `keep`, of a layer's dense weights, once for the whole run."""
        return self._carrier.keep_dense(name)

    def _send(self, call: _Call) -> _Call:
        with self._connection.explained():
            call.expected = self._carrier.update(call.place, call.weights)
            call.actor = call.place.actor
            if call.keeps:
                remote = call.actor.call_and_keep.options(num_returns=2)
                call.answer, call.kept = remote.remote(call.request)
            else:
                call.answer = call.actor.call.remote(call.request, call.span)
        return call

    def _receive(self, call: _Call) -> Any:
        while True:
            try:
                with self._connection.explained():
                    found = self._ray.get(self._connection.wait([call.answer]))
                weights, answer = (found, call.kept) if call.keeps else (found[0], thaw(found[1]))
                if weights == call.expected:
                    return answer
                problem = self._places.explain_weights(call.place)
            except self._ray.exceptions.RayActorError:
                problem = "died"
            if call.actor is call.place.actor:  # else another call has found it so already
                self._places.replace(call.place, problem)
            call.place = self._places.stand_in(call.place)
            self._send(call)
