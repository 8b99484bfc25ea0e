"""The team of a run on Ray: one worker for each device, on this machine or on a cluster that is there already.

Workers hold a model each; of what is pruned, only layers that changed travel, through Ray's object store and once for
all who need them. What a worker answers depends on nothing but the request and the weights, so that the work of one
that died is simply asked for again.
"""

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.base.errors import UserError, in_one_line
from tools.base.settings import TeamSettings, count_threads
from tools.statistics.shards import SHARDS, Answers, Span, share_out
from tools.team.worker import Identity, Texts, Worker, identify

DEATHS = 3
"""Of one worker after the other in one place, before the run stops."""

START_SECONDS = 600
"""Within which a worker must have loaded its model."""


Weights = Mapping[str, str]
"""What a whole model's prunable weights are: the artifact of each layer, by its name."""


class WeightSource(Protocol):
    """Where the workers' models get their weights from."""

    @property
    def installed(self) -> Weights:
        """The weights as they are in this process: the workers' own, unless a request is about others."""

    @property
    def dense(self) -> Mapping[str, Tensor]:
        """The weights of each layer as it was loaded, (O, I)."""

    def read_artifact(self, name: str, artifact: str) -> dict[str, Tensor]:
        """A layer's mask, and its values unless they are the dense weights'. Raises DamagedArtifact."""

    def mark_blocks(self, weights: Weights) -> list[str]:
        """For each block, a name of the weights of all blocks before it."""


@dataclass
class _Place:
    """One worker after another, should they die."""

    number: int
    actor: Any
    opened: Any
    """A reference to what `_Actor.open` answers."""
    host: str = ""
    pid: int = 0
    installed: dict[str, str] = field(default_factory=dict)
    """Layers that are not as the model was loaded."""
    deaths: int = 0


@dataclass
class _Request:
    method: str
    arguments: Any
    """A reference to them in the object store."""
    size: int
    """Shards or items that it is about."""
    place: _Place
    weights: Weights | None = None
    """Those that the worker is to have; None for those in this process, whatever they are when it is sent."""
    keeps: bool = False
    """Whether the answer stays in the object store."""
    actor: Any = None
    answer: Any = None
    """A reference to it, or to the word that it is kept."""
    kept: Any = None


class Cluster:
    """The workers of one run. Raises UserError when they cannot be had."""

    ahead = 1

    def __init__(
        self, settings: TeamSettings, texts: Texts, source: WeightSource, model: Any, warn: Callable[[str], None]
    ) -> None:
        """`model` is this process' own, as it was loaded."""
        self._source, self._warn, self._settings = source, warn, settings
        self._shards = min(SHARDS, len(texts.windows.calibration))
        self._loaded = dict(source.installed)
        self._kept: dict[tuple[str, str], Any] = {}
        self._coming: list[Weights] = []
        self._identity = identify(model)
        self._places: list[_Place] = []
        self._idle: list[_Place] = []
        self._ray, self._directory = _connect(settings)
        try:
            count, self._threads = _count_workers(self._ray, settings, model.device.type)
            self._texts = self.keep(texts)
            self._device = model.device.type
            self._places = [_Place(i, *self._start()) for i in range(count)]  # all load their models at once
            for place in self._places:
                self._open(place)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._places)

    def use(self, count: int) -> None:
        """From now on only the first so many workers have work, to measure what more of them bring."""
        everyone = [*self._places, *self._idle]
        self._places, self._idle = everyone[:count], everyone[count:]

    def take_busy_seconds(self) -> float:
        """Seconds that the workers in use spent on their requests since this was last asked, all together."""
        return float(sum(self._ray.get([place.actor.take_busy_seconds.remote() for place in self._places])))

    def close(self) -> None:
        """Let the workers go, and Ray where it was begun here."""
        for place in [*self._places, *self._idle]:
            with contextlib.suppress(Exception):
                self._ray.kill(place.actor)
        self._kept.clear()
        with contextlib.suppress(Exception):
            self._ray.shutdown()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    # --- asking ------------------------------------------------------------------------------------------------

    def ask(self, method: str, *arguments: Any) -> Answers:
        """Begin with `method(span, *arguments)` of every worker, each with its span of the shards."""
        return self.share(method, self._shards, *arguments)

    def share(self, method: str, count: int, *arguments: Any) -> Answers:
        """As `ask`, of any `count` items."""
        given = self.keep(arguments)
        spans = share_out(count, len(self._places))
        requests = [
            self._send(_Request(method, (span, given), span[1] - span[0], place))
            for span, place in zip(spans, self._places, strict=False)
        ]

        def collect(tick: Callable[[int], None]) -> list[Any]:
            answers = []
            for request in requests:
                answers.append(self._receive(request))
                tick(request.size)
            return answers

        return collect

    def hand_out(
        self, method: str, jobs: Iterable[tuple[Any, ...]], weights: Sequence[Weights] = (), *, keeps: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """(number of a job, answer of `method(*job)`), in the order in which they are done, by whoever is free.

        With `weights` each job is about its own, else all are about those in this process. No more jobs are drawn than
        the workers have in hand and in line. With `keeps` answers stay in the object store, and references stand for
        them, in the arguments of other requests, too. Raises DamagedArtifact.
        """
        waiting = enumerate(jobs)
        running: dict[Any, tuple[int, _Request]] = {}
        self._coming = list(reversed(weights))

        def give(place: _Place) -> None:
            for number, job in islice(waiting, 1):
                own = self._coming.pop() if weights else None
                request = self._send(_Request(method, (None, self.keep(job)), 1, place, own, keeps))
                running[request.answer] = number, request

        try:
            for place in [*self._places, *self._places]:  # one to work on, and one in line
                give(place)
            while running:
                with self._explained():
                    done, _ = self._ray.wait(list(running), num_returns=1)
                number, request = running.pop(done[0])
                answer = self._receive(request)
                give(request.place)
                yield number, answer
        finally:
            self._coming = []

    def keep(self, value: Any) -> Any:
        """A value put where all workers can read it: to stand for it in the arguments of several requests."""
        return self._ray.put(freeze(value))

    def keep_dense(self, name: str, weight_OI: Tensor) -> Any:
        """As `keep`, of a layer's dense weights, once for the whole run."""
        key = name, "dense weights"
        if key not in self._kept:
            self._kept[key] = self.keep(weight_OI)
        return self._kept[key]

    def _send(self, request: _Request) -> _Request:
        with self._explained():
            self._update(request.place, self._source.installed if request.weights is None else request.weights)
            request.actor = request.place.actor
            if request.keeps:
                call = request.actor.call_and_keep.options(num_returns=2)
                request.answer, request.kept = call.remote(request.method, *request.arguments)
            else:
                request.answer = request.actor.call.remote(request.method, *request.arguments)
        return request

    def _receive(self, request: _Request) -> Any:
        while True:
            try:
                with self._explained():
                    answer = thaw(self._ray.get(request.answer))
                return request.kept if request.keeps else answer
            except self._ray.exceptions.RayActorError:
                if request.actor is request.place.actor:  # else another request has found it dead already
                    self._replace(request.place)
                if request.place not in self._places:
                    request.place = self._places[request.place.number % len(self._places)]
                self._send(request)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayActorError:
            raise
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except (errors.RayError, ConnectionError) as error:
            line = in_one_line(error, 200)
            raise UserError(
                f"the Ray cluster is gone ({type(error).__name__}: {line}); when it is there again, go on: a run with "
                "--resume, any other command as before"
            ) from error

    def _update(self, place: _Place, weights: Weights) -> None:
        """Give a worker the layers of these weights that are other than those it has."""
        wanted = {name: artifact for name, artifact in weights.items() if artifact != self._loaded[name]}
        changed = [name for name in self._loaded if wanted.get(name) != place.installed.get(name)]
        if not changed:
            return
        found = {name: self._find_weight(name, weights[name]) for name in changed}
        place.actor.call.remote("install", None, self.keep((found, self._source.mark_blocks(weights))))
        place.installed = wanted
        self._forget_weights()

    def _find_weight(self, name: str, artifact: str) -> Any:
        if artifact == self._loaded[name]:
            return {"dense": self.keep_dense(name, self._source.dense[name])}
        key = name, artifact
        if key not in self._kept:
            tensors: dict[str, Any] = dict(self._source.read_artifact(name, artifact))
            if "values" not in tensors:  # the dense weights are there once, whatever masks they are given
                tensors["dense"] = self.keep_dense(name, self._source.dense[name])
            self._kept[key] = self.keep(tensors)
        return self._kept[key]

    def _forget_weights(self) -> None:
        """What others may still need is kept: the weights in this process, those of coming jobs, the dense ones."""
        needed = [self._source.installed, *self._coming]
        for name, artifact in list(self._kept):
            if artifact != "dense weights" and all(weights[name] != artifact for weights in needed):
                del self._kept[name, artifact]

    # --- workers -----------------------------------------------------------------------------------------------

    def _start(self) -> tuple[Any, Any]:
        """(a new worker, a reference to its identity and host)."""
        options: dict[str, Any] = {"num_cpus": self._threads, "max_restarts": 0}
        if self._device == "cuda":
            options["num_gpus"] = 1
        actor = self._ray.remote(**options)(_Actor).remote()
        return actor, actor.open.remote(self._settings, self._texts, self._threads)

    def _open(self, place: _Place) -> None:
        """Wait for a worker's model. Raises UserError for one that is not like this process."""
        with self._explained():
            try:
                identity, place.host, place.pid = self._ray.get(place.opened, timeout=START_SECONDS)
            except self._ray.exceptions.GetTimeoutError as error:
                raise UserError(
                    f"worker {place.number} did not start within {START_SECONDS} seconds; has the cluster "
                    f"{self._threads} free CPUs for it?"
                ) from error
        if difference := self._identity.explain_difference(identity):
            raise UserError(
                f"worker {place.number} on {place.host} has {difference}; give it the same, and start again"
            )

    def _replace(self, place: _Place) -> None:
        place.deaths += 1
        if place.deaths > DEATHS:
            raise UserError(
                f"worker {place.number} on {place.host} died {place.deaths} times; it may lack memory. Go on with "
                "fewer --workers: a run with --resume, any other command as before"
            )
        self._warn(f"worker {place.number} on {place.host} died; another one does its share again")
        (place.actor, place.opened), place.installed = self._start(), {}
        try:
            self._open(place)
        except (UserError, self._ray.exceptions.RayActorError):
            if len(self._places) == 1:
                raise
            self._warn(f"no worker can take the place of number {place.number}; the others share its work")
            self._places.remove(place)


class _Actor:
    """What Ray runs: a worker, and the way of values in and out."""

    def open(self, settings: TeamSettings, texts: Any, threads: int) -> tuple[Identity, str, int]:
        """Load the model; who this is, on which machine, and the number of its process."""
        from tools.measure.losses import limit_prefix
        from tools.models.load import load_model

        torch.set_num_threads(threads)
        self._scratch, self._busy = tempfile.TemporaryDirectory(), 0.0
        model, _ = load_model(settings)
        identity = identify(model)
        self._worker = Worker(model, settings, thaw(texts), Path(self._scratch.name), limit_prefix(model))
        return identity, socket.gethostname(), os.getpid()

    def call(self, method: str, span: Span | None, arguments: Any) -> Any:
        """`method(span, *arguments)`, without the span where it is None."""
        given = thaw(arguments) if span is None else (span, *thaw(arguments))
        began = time.perf_counter()
        answer = getattr(self._worker, method)(*given)
        self._busy += time.perf_counter() - began
        return freeze(answer)

    def call_and_keep(self, method: str, span: Span | None, arguments: Any) -> tuple[str, Any]:
        """As `call`, with a word that it went well, which is read while the answer is not."""
        return "kept", self.call(method, span, arguments)

    def take_busy_seconds(self) -> float:
        """Seconds spent on requests since this was last asked."""
        busy, self._busy = self._busy, 0.0
        return busy


# --- values in and out -------------------------------------------------------------------------------------------


class _Array(NamedTuple):
    """A tensor on its way: Ray moves numpy's arrays without copying them."""

    values: NDArray[Any]
    dtype: str
    """Of torch: numpy has no bf16."""


def freeze(value: Any) -> Any:
    """The value with arrays for tensors, through dicts, lists and tuples."""
    if isinstance(value, Tensor):
        whole = value.detach().cpu().contiguous()
        bits = whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole
        return _Array(bits.numpy(), str(whole.dtype).removeprefix("torch."))
    return _walk_through(value, freeze)


def thaw(value: Any) -> Any:
    """What was frozen, with tensors of their own memory; references to kept values become these."""
    if isinstance(value, _Array):
        return torch.from_numpy(np.array(value.values)).view(getattr(torch, value.dtype))
    if type(value).__name__ == "ObjectRef":
        return thaw(_import_ray().get(value))
    return _walk_through(value, thaw)


def _walk_through(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: change(part) for key, part in value.items()}
    if isinstance(value, list):
        return [change(part) for part in value]
    if isinstance(value, tuple):
        parts = [change(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


# --- Ray ---------------------------------------------------------------------------------------------------------


def _import_ray() -> Any:
    # Read when ray is imported. Nothing is sent anywhere, and its own long lines about dead workers are not printed
    # among ours.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("workers need Ray, which is not installed; try: pip install -e '.[ray]'") from error
    return ray


def _connect(settings: TeamSettings) -> tuple[Any, str]:
    """(Ray, the directory of its files): one begun for this machine alone, or one that is there. Raises UserError."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "billhook"}
    directory = ""
    if settings.workers.isdigit():
        # Without this Ray listens on all interfaces, whatever address it is given.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read when ray is imported
        directory = tempfile.mkdtemp(prefix="billhook-ray-")
        options |= {"address": "local", "_node_ip_address": "127.0.0.1", "_temp_dir": directory}
        options |= {"num_cpus": int(settings.workers) * count_threads(settings), "include_dashboard": False}
        options["_system_config"] = {"worker_niceness": 0}  # by default they give way to whatever else runs
    else:
        options["address"] = settings.workers
    ray = _import_ray()
    if ray.is_initialized():
        raise UserError("this process is connected to Ray already; one run uses it at a time")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own
            ray.init(**options)
    except Exception as error:
        line = in_one_line(error, 200)
        hint = "; a cluster with a token needs RAY_AUTH_MODE=token here" if "://" in settings.workers else ""
        raise UserError(f"Ray at {settings.workers!r} cannot be reached: {line}{hint}") from error
    return ray, directory


def _count_workers(ray: Any, settings: TeamSettings, device: str) -> tuple[int, int]:
    """(workers, threads of each): a worker for each GPU, or for as many CPUs as it has threads."""
    threads = count_threads(settings)
    if settings.workers.isdigit():
        return int(settings.workers), threads
    there = ray.cluster_resources()
    count = int(there.get("GPU", 0)) if device == "cuda" else int(there.get("CPU", 0)) // threads
    if count < 1:
        kind = "GPU" if device == "cuda" else "CPU"
        raise UserError(f"the Ray cluster at {settings.workers!r} has no {kind} for a worker")
    return min(count, SHARDS), threads
