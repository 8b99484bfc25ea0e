"""The way to Ray: begun for this machine alone, or a cluster that is there already."""

import contextlib
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from tools.base.errors import BrokenPlan, UserError, in_one_line
from tools.base.progress import heed_stop
from tools.base.settings import TeamSettings, count_threads
from tools.statistics.shards import SHARDS

POLL_SECONDS = 0.2
"""How often whoever waits for workers looks whether the work is to end."""


def import_ray() -> Any:
    """Ray. Raises UserError where it is not installed."""
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


class Connection:
    """Ray, as one run uses it."""

    def __init__(self, ray: Any, directory: str = "") -> None:
        """`directory` holds the files of a Ray that was begun here, and is deleted with it."""
        self.ray, self.directory = ray, directory

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what Ray raises into UserError, but for a worker's death (RayActorError) and a BrokenPlan."""
        errors = self.ray.exceptions
        try:
            yield
        except errors.RayActorError:
            raise
        except errors.RayTaskError as error:
            if isinstance(error.cause, BrokenPlan | UserError):
                raise type(error.cause)(str(error.cause)) from None
            raise
        except (errors.RayError, ConnectionError) as error:
            line = in_one_line(error, 200)
            raise UserError(
                f"the Ray cluster is gone ({type(error).__name__}: {line}); when it is there again, go on: a run with "
                "--resume, any other command as before"
            ) from error

    def wait(self, answers: Sequence[Any], seconds: float = float("inf")) -> Any:
        """The first of these references whose value is there, or an error instead; None where the time is over.

        Raises Stopped where the work is to end: workers then go on with what they have begun, until they are let go.
        """
        end = time.monotonic() + seconds
        while True:
            heed_stop()
            done, _ = self.ray.wait(list(answers), num_returns=1, timeout=POLL_SECONDS)
            if done:
                return done[0]
            if time.monotonic() > end:
                return None

    def close(self) -> None:
        """Let Ray go where it was begun here."""
        with contextlib.suppress(Exception):
            self.ray.shutdown()
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)


def connect(settings: TeamSettings) -> Connection:
    """Ray begun for this machine alone, or one that is there. Raises UserError."""
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
    ray = import_ray()
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
    return Connection(ray, directory)


def count_workers(connection: Connection, settings: TeamSettings, device: str) -> int:
    """A worker for each GPU, or for as many CPUs as it has threads. Raises UserError where there is none."""
    if settings.workers.isdigit():
        return int(settings.workers)
    there = connection.ray.cluster_resources()
    count = int(there.get("GPU", 0)) if device == "cuda" else int(there.get("CPU", 0)) // count_threads(settings)
    if count < 1:
        kind = "GPU" if device == "cuda" else "CPU"
        raise UserError(f"the Ray cluster at {settings.workers!r} has no {kind} for a worker")
    return min(count, SHARDS)
