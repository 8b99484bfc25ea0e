"""Where the workers of a team are: one after another in each place, should they die."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.base.errors import UserError, explain_work, in_one_line
from tools.base.progress import Warn
from tools.base.settings import TeamSettings, count_threads
from tools.measure.losses import limit_prefix
from tools.models.load import load_model
from tools.team.connection import Connection, import_ray
from tools.team.requests import Job, OnSpan
from tools.team.worker import Identity, KeptPlace, Texts, Worker, identify

T = TypeVar("T")


class Reference(NamedTuple, Generic[T]):
    """A value in Ray's object store."""

    ref: Any
    """Ray's own reference to what it was frozen to."""

    def fetch(self) -> T:
        """The value, with tensors of their own memory."""
        return cast(T, thaw(import_ray().get(self.ref)))


def keep(ray: Any, value: T) -> Reference[T]:
    """A value put where all workers can read it, to stand for it in several requests."""
    return Reference(ray.put(freeze(value)))


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
    """What was frozen, with tensors of their own memory."""
    if isinstance(value, _Array):
        return torch.from_numpy(np.array(value.values)).view(getattr(torch, value.dtype))
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


class Actor:
    """A worker. What goes in and comes out is frozen."""

    def open(
        self, settings: TeamSettings, texts: Any, threads: int, scratch: Path | None, keeps: KeptPlace | None = None
    ) -> tuple[Identity, str, int]:
        """Load the model; who this is, on which machine, and the number of its process.

        Files without a name lie in the directory `scratch`, or where this system has its files for a while. `keeps` is
        as `Worker` has it.
        """
        torch.set_num_threads(threads)
        scratch = scratch or Path(tempfile.gettempdir())
        model, _ = load_model(settings, scratch)
        identity = identify(model)
        self._worker = Worker(model, settings, thaw(texts), scratch, limit_prefix(model), keeps)
        return identity, socket.gethostname(), os.getpid()

    def call(self, request: Any, span: tuple[int, int] | None) -> tuple[str, Any]:
        """(the name of the model's weights, the answer to a `Job`, or with a span to a `Shared`)."""
        answer = self._answer(thaw(request) if span is None else OnSpan(thaw(request), span))
        return self._worker.weights, answer

    def _answer(self, job: Job[Any]) -> Any:
        with explain_work(f"worker {os.getpid()} on {socket.gethostname()}"):
            return freeze(job.run(self._worker))

    def call_and_keep(self, request: Any) -> tuple[str, Any]:
        """As `call` of a job: the name is read, the answer is not."""
        return self.call(request, None)


DEATHS = 3
"""Of one worker after the other in one place, before the run stops."""

START_SECONDS = 600
"""Within which a worker must have loaded its model, beside the time that files of its weights take."""

WRITE_RATE = 10**8
"""Bytes of such files a second that a slow disk takes, of all workers together."""


@dataclass
class Place:
    """One worker after another, should they die."""

    number: int
    actor: Any
    opened: Any
    """A reference to what `Actor.open` answers."""
    host: str = ""
    pid: int = 0
    installed: dict[str, str] = field(default_factory=dict)
    """Layers that are not as the model was loaded."""
    sent: Any = None
    """A reference to what came of the last weights that it was sent."""
    deaths: int = 0


class Places:
    """All places of a team, of which some may be idle."""

    def __init__(
        self,
        connection: Connection,
        settings: TeamSettings,
        identity: Identity,
        device: str,
        scratch: Path | None,
        warn: Warn,
        keeps: KeptPlace | None = None,
    ) -> None:
        """`identity` is this process', `device` (cpu or cuda) what the workers' models are on, and `scratch` the
        directory of their files without a name; None where they have none in common. `keeps` is as `Worker` has it."""
        self.used: list[Place] = []
        self._idle: list[Place] = []
        self._connection, self._settings, self._identity, self._warn = connection, settings, identity, warn
        self._device, self._threads, self._scratch = device, count_threads(settings), scratch
        self._keeps = keeps
        self._seconds = float(START_SECONDS)
        self._texts: Any = None

    def open(self, count: int, texts: Texts, written: int) -> None:
        """Begin with so many workers, each of which writes so many bytes of weights to a file of its own.

        Raises UserError when one cannot be had, or is not like this process.
        """
        self._seconds += count * written / WRITE_RATE
        self._texts = keep(self._connection.ray, texts).ref
        self.used = [Place(i, *self._start()) for i in range(count)]  # all load their models at once
        for place in self.used:
            self._wait_for(place)

    def use(self, count: int) -> None:
        """From now on only the first so many have work."""
        everyone = [*self.used, *self._idle]
        self.used, self._idle = everyone[:count], everyone[count:]

    def close(self) -> None:
        """Let the workers go."""
        for place in [*self.used, *self._idle]:
            with contextlib.suppress(Exception):
                self._connection.ray.kill(place.actor)

    def explain_weights(self, place: Place) -> str:
        """Why a worker's weights are others than those that it was sent last, in a few words."""
        try:
            self._connection.ray.get(place.sent)
        except Exception as error:  # whatever went wrong there
            cause = getattr(error, "cause", None) or error
            return f"has not the weights that it was sent ({in_one_line(cause, 200)})"
        return "has other weights than it was sent"

    def replace(self, place: Place, problem: str = "died") -> None:
        """Another worker for one that died, or has a `problem`; without one its place is given up.

        Raises UserError when too many died there, or no other place is left.
        """
        place.deaths += 1
        if place.deaths > DEATHS:
            raise UserError(
                f"worker {place.number} on {place.host} died {place.deaths} times; it may lack memory. Go on with "
                "fewer --workers: a run with --resume, any other command as before"
            )
        self._warn(f"worker {place.number} on {place.host} {problem}; another one does its share again")
        with contextlib.suppress(Exception):
            self._connection.ray.kill(place.actor)
        (place.actor, place.opened), place.installed = self._start(), {}
        try:
            self._wait_for(place)
        except (UserError, self._connection.ray.exceptions.RayActorError):
            if len(self.used) == 1:
                raise
            self._warn(f"no worker can take the place of number {place.number}; the others share its work")
            with contextlib.suppress(Exception):  # one that never answered, or is not like the others, is there still
                self._connection.ray.kill(place.actor)
            self.used.remove(place)

    def stand_in(self, place: Place) -> Place:
        """The place itself, or where it was given up the one that has its work now."""
        return place if place in self.used else self.used[place.number % len(self.used)]

    def _start(self) -> tuple[Any, Any]:
        """(a new worker, a reference to its identity and host)."""
        options: dict[str, Any] = {"num_cpus": self._threads, "max_restarts": 0}
        if self._device == "cuda":
            options["num_gpus"] = 1
        actor = self._connection.ray.remote(**options)(Actor).remote()
        return actor, actor.open.remote(self._settings, self._texts, self._threads, self._scratch, self._keeps)

    def _wait_for(self, place: Place) -> None:
        """Wait for a worker's model. Raises UserError for one that is not like this process."""
        with self._connection.explained():
            if self._connection.wait([place.opened], self._seconds) is None:
                raise UserError(
                    f"worker {place.number} did not start within {self._seconds:.0f} seconds; has the cluster "
                    f"{self._threads} free CPUs for it?"
                )
            identity, place.host, place.pid = self._connection.ray.get(place.opened)
        if difference := self._identity.explain_difference(identity):
            raise UserError(
                f"worker {place.number} on {place.host} has {difference}; give it the same, and start again"
            )
