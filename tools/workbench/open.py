"""The workbench of this process: one model at a time, and one run directory, which others are kept out of."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tools.base.progress import Progress, Warn
from tools.base.rundir import lock_run, unlock_run
from tools.base.settings import TeamSettings, WorkbenchSettings

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench

_lock = threading.RLock()
_open: "list[Workbench]" = []


@contextmanager
def use_workbench(
    settings: WorkbenchSettings, directory: Path, warn: Warn, progress: Progress
) -> "Iterator[Workbench]":
    """The workbench of a run directory, opened if need be, for one user at a time in this process.

    Only one model is held: opening another run's workbench closes the last. Raises UserError when the directory is
    in use by another process.
    """
    from tools.workbench.bench import Workbench  # torch takes seconds to import, and bad input should not wait for it

    settings = TeamSettings.model_validate(settings.model_dump(include=set(TeamSettings.model_fields)))
    directory = directory.resolve()
    with _lock:
        if _open and (_open[0].directory != directory or _open[0].settings != settings):
            close_workbench()
        if not _open:
            lock_run(directory)
            _open.append(Workbench(settings, directory, warn, progress))
        _open[0].warn = warn
        yield _open[0]


def close_workbench() -> None:
    """Let go of the loaded model and of its run directory."""
    with _lock:
        while _open:
            bench = _open.pop()
            bench.close()
            unlock_run(bench.directory)
        gc.collect()
