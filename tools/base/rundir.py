"""A run's directory: its parts, its lock, its log of events."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tools.base.errors import UserError
from tools.base.files import explain_full_disk
from tools.base.secrets import redact

RUNS_DIR_VARIABLE = "BILLHOOK_RUNS_DIR"

_locks: dict[Path, FileLock] = {}
_holders: Counter[Path] = Counter()
_unlocked: set[Path] = set()
"""Directories that somebody holds and somebody else has unlocked."""
_guard = threading.RLock()
"""Nodes of several runs are at work in a server, each in a thread."""


def runs_directory() -> Path:
    """Where runs live when nothing else is said: `BILLHOOK_RUNS_DIR`, or runs/ in the present directory."""
    return Path(os.environ.get(RUNS_DIR_VARIABLE) or "runs")


def list_places(name: str) -> tuple[Path, Path]:
    """Where a run may be that is named by its directory, or by its name under runs/."""
    return Path(name), runs_directory() / name


def lock_run(directory: Path) -> None:
    """Keep other processes out of a run directory until this one ends or calls `unlock_run`.

    The lock is the operating system's, so that a killed process leaves none behind. Raises UserError when another
    process works there.
    """
    directory = directory.resolve()
    if directory in _locks:
        _unlocked.discard(directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock", timeout=0, thread_local=False)  # nodes run in whatever thread LangGraph picks
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"another process is working in {directory}; wait for it, or use another --name") from error
    _locks[directory] = lock


def unlock_run(directory: Path) -> None:
    """Let others in again, once nobody holds the directory; nothing happens where no lock is held."""
    directory = directory.resolve()
    with _guard:
        if _holders[directory]:
            _unlocked.add(directory)
            return
        _unlocked.discard(directory)
        if lock := _locks.pop(directory, None):
            lock.release()


@contextmanager
def hold_run(directory: Path) -> Iterator[None]:
    """Keep others out of a run directory inside, whoever unlocks it meanwhile. Raises UserError as `lock_run` does."""
    directory = directory.resolve()
    with _guard:
        lock_run(directory)
        _holders[directory] += 1
    try:
        yield
    finally:
        with _guard:
            _holders[directory] -= 1
            if directory in _unlocked and not _holders[directory]:
                unlock_run(directory)


def unlock_runs() -> None:
    """Let others into every directory again that this process has locked."""
    for directory in list(_locks):
        unlock_run(directory)


def append_event(directory: Path, event: dict[str, Any]) -> None:
    """Add one line to `events.jsonl`, with the time and without any secret of the environment."""
    line = f'{{"time": {round(time.time(), 3)}, {write_event(event)[1:]}'
    path = directory / "events.jsonl"
    with explain_full_disk(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"  # a kill cut the last line short
            file.write(b"\n" * torn)
        file.write(f"{line}\n".encode())


def write_event(event: dict[str, Any]) -> str:
    """An event as its line has it, but for the time."""
    return redact(json.dumps(event, ensure_ascii=False, default=str))


def scan_events(directory: Path, *types: str) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line from 0, event) of every event of these types, without lines that a kill cut short.

    Reads no more of a line than it must: prompts and replies are very long.
    """
    found, marks = [], [f'"type": "{type_}"' for type_ in types]
    with suppress(FileNotFoundError), (directory / "events.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if any(mark in line[:100] for mark in marks):
                with suppress(ValueError):
                    found.append((number, json.loads(line)))
    return found
