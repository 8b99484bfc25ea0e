"""What Ray runs in a process of its own: a worker, and the way of values in and out."""

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch

from tools.base.failures import explain_work
from tools.base.settings import TeamSettings
from tools.measure.losses import limit_prefix
from tools.models.load import load_model
from tools.team.frozen import freeze, thaw
from tools.team.identity import Identity, identify
from tools.team.requests import Job, OnSpan
from tools.team.worker import KeptPlace, Worker


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
