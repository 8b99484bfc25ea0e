"""The workbench of this process: one model at a time, and one run directory, which others are kept out of."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.base.errors import DamagedArtifact
from tools.base.memory import give_back
from tools.base.progress import Progress, Warn
from tools.base.rundir import lock_run, unlock_run
from tools.base.settings import TeamSettings, WorkbenchSettings
from tools.workbench.store import DENSE

if TYPE_CHECKING:
    from tools.estimate.memory import Course
    from tools.workbench.bench import Workbench

_lock = threading.RLock()
_open: "list[Workbench]" = []


@contextmanager
def use_workbench(
    settings: WorkbenchSettings, directory: Path, warn: Warn, progress: Progress, course: "Course | None" = None
) -> "Iterator[Workbench]":
    """The workbench of a run directory, opened if need be, for one user at a time in this process.

    Only one model is held: opening another run's workbench closes the last. One whose named texts alone are others,
    as once a goal was read, goes on with the loaded model. `course` is as `Workbench` has it. Raises UserError
    when the directory is in use by another process.
    """
    from tools.workbench.bench import Workbench  # torch takes seconds to import, and bad input should not wait for it

    settings = TeamSettings.model_validate(settings.model_dump(include=set(TeamSettings.model_fields)))
    directory = directory.resolve()
    with _lock:
        loaded = None
        if _open and (_open[0].directory != directory or _open[0].settings != settings):
            loaded = _take_model(_open[0], settings) if _open[0].directory == directory else None
            close_workbench()
        if not _open:
            lock_run(directory)
            _open.append(Workbench(settings, directory, warn, progress, loaded, course))
        _open[0].warn = warn
        try:
            yield _open[0]
        finally:
            give_back()


def _take_model(bench: "Workbench", settings: TeamSettings) -> tuple[Any, Any] | None:
    """The model, with its dense weights, and the tokenizer; None where they may be others by these settings.

    Experts are taken apart where they are found, and are not looked for in what was.
    """
    texts = {"text", "text_weights"}
    if bench.settings.model_dump(exclude=texts) != settings.model_dump(exclude=texts):
        return None
    if any(layer.pool for layer in bench.weights.layers):
        return None
    with suppress(DamagedArtifact):
        bench.pruner.restore(DENSE)
        return bench.model, bench.tokenizer
    return None


def close_workbench() -> None:
    """Let go of the loaded model and of its run directory."""
    with _lock:
        while _open:
            bench = _open.pop()
            bench.close()
            unlock_run(bench.directory)
        give_back()
