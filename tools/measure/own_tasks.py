"""Tasks of our own: each is a file in `tools/measure/tasks/`, found by its name, with an OwnTask called TASK."""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools.base.files import hash_file
from tools.base.settings import TaskSettings
from tools.measure import tasks
from tools.texts.questions import Question


class OwnTask(NamedTuple):
    """A task that lm-evaluation-harness lacks, or whose questions a setting chooses.

    A leaf of the harness' task, which holds questions, may have two methods that the harness does not know:
    `meet_model(lm)` is called before it is asked, and what `describe_metric(metric)` returns is in the protocol of that
    figure.
    """

    sentence: str
    """What it asks, without a full stop."""
    check: Callable[[TaskSettings], object]
    """Refuses, before anything is loaded, what cannot be asked; raises UserError. Imports neither harness nor torch."""
    load: Callable[[TaskSettings], tuple[Any, Any]]
    """(the harness' task, group or list of tasks; where its questions come from: hub, or the hash of each file)."""
    read_questions: Callable[[TaskSettings], Iterator[Question]] | None = None
    """The questions after the exemplars, in order, where a run may judge plans by the same ones."""


@functools.cache
def find_own_tasks() -> dict[str, OwnTask]:
    """All of them by name, in the order of the alphabet."""
    names = sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))
    return {name: importlib.import_module(f"{tasks.__name__}.{name}").TASK for name in names}


def hash_files(*paths: Path) -> dict[str, str]:
    """What a protocol says of questions from files: their names, and the hash of each."""
    return {path.name: hash_file(path) for path in paths}
