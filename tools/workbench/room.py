"""Whether the disk has room for what a run may write, before it writes anything."""

import math
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tools.base.errors import UserError
from tools.base.progress import Warn
from tools.base.settings import TeamSettings
from tools.base.words import show_size
from tools.estimate.memory import Course
from tools.estimate.needs import count_cut, count_polish_disk
from tools.models.disk import plan_disk
from tools.models.layers import Layer
from tools.models.source import list_in_source
from tools.models.streamed import find_stream
from tools.statistics.shards import count_waiting


def fit_disk(
    model: Any,
    layers: list[Layer],
    settings: TeamSettings,
    directory: Path,
    lead: int,
    course: Course,
    warn: Warn,
) -> int | None:
    """Of how many blocks second moments may lie on disk at once; None where there is room for those of all.

    What is there already is room. Raises UserError where all else that the course writes has none, and for a cut that
    cannot be.
    """
    stream = find_stream(model)
    in_source = list_in_source(layers, stream.source) if stream else set[str]()
    free = shutil.disk_usage(directory).free + _count_written(directory)
    if stream:  # the model as it is now, in a file without a name
        free += sum(parameter.nbytes for parameter in model.parameters())
    polish = count_polish_disk(model, layers, settings, lead, course)
    room = min(free, settings.disk * 1e9 or math.inf)
    waiting = count_waiting(settings.count_all("calibration"))
    count = partial(
        plan_disk,
        model,
        layers,
        settings,
        lead=lead,
        streamed=stream is not None,
        in_source=in_source,
        waiting=waiting,
        checkpoints=course.checkpoints,
        sizes=count_cut(model, layers, course),
    )
    plan = count(room - polish)
    needed = plan.bytes + polish
    if needed > room:
        if room < free:
            raise UserError(
                f"a run of this model may write {show_size(needed)} to {directory}, but --disk allows "
                f"{show_size(room)}; allow more"
            )
        raise UserError(
            f"the disk is full: a run of this model may write {show_size(needed, 'GB')} to {directory}, "
            f"but {show_size(free, 'GB')} are free or its own; free some, or use another --runs-dir"
        )
    if plan.at_once:
        kept = count(math.inf).bytes + polish
        warn(
            f"second moments are not kept, which takes a disk of {show_size(kept)}, and {show_size(room)} are "
            "there: they are collected anew whenever layers are pruned, block by block"
        )
    return plan.at_once


def _count_written(directory: Path) -> int:
    """Bytes of all files there."""
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # one that is renamed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
