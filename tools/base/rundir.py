"""A run's directory: its parts, its lock, its log of events, and whether they are what was written."""

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tools.base.errors import UserError
from tools.base.files import explain_full_disk, write_bytes
from tools.base.made import advise, read_made, read_result
from tools.base.seals import DIGITS, BrokenSeal, check_lines, follow_line, seal_line, seal_lines, split_line
from tools.base.secrets import redact

RUNS_DIR_VARIABLE = "BILLHOOK_RUNS_DIR"

LAST = ".last"
"""The file beside the log that says which line was written last."""

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


# The log


def append_event(directory: Path, event: dict[str, Any]) -> None:
    """Add one line to `events.jsonl`, with the time and its seal, and without any secret of the environment."""
    line = f'{{"time": {round(time.time(), 3)}, {write_event(event)[1:]}'.encode()
    path = directory / "events.jsonl"
    with explain_full_disk(path), path.open("a+b") as file:
        end = file.tell()
        file.seek(max(0, end - 64))
        tail = file.read()
        before = split_line(tail.removesuffix(b"\n"))[1]
        if not before:  # the first line, or one behind a line that a crash cut short
            file.seek(0)
            before = read_made(directory).log
            for known in file:
                before = follow_line(known.rstrip(b"\n"), before)
        sealed = seal_line(line, before)
        file.write(b"\n" * (end > 0 and not tail.endswith(b"\n")) + sealed + b"\n")
        file.flush()
        os.fsync(file.fileno())  # a state that knows the line may be on the disk when the power fails
        _note_last(directory, sealed)


def rewrite_log(directory: Path, lines: Iterable[bytes]) -> None:
    """Make these lines, JSON objects without ends of line, the whole log; their seals are renewed."""
    text = seal_lines(lines, read_made(directory).log)
    (directory / LAST).unlink(missing_ok=True)  # a kill leaves none rather than that of a line that is no more
    write_bytes(directory / "events.jsonl", text)
    _note_last(directory, text.removesuffix(b"\n").rpartition(b"\n")[2])


def _note_last(directory: Path, line: bytes) -> None:
    """Keep the seal of the last line beside the log, so that a log that was cut at the end of a line is noticed.

    It is written over the earlier one at once: a kill leaves either, and a log may have more lines than are noted.
    """
    file = os.open(directory / LAST, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(file, split_line(line)[1].encode(), 0)
        os.truncate(file, DIGITS)
    finally:
        os.close(file)


def _read_noted(directory: Path) -> str:
    """What `_note_last` noted; "" where that was never, as in runs of an earlier version, or is no seal."""
    path = directory / LAST
    noted = path.read_bytes() if path.is_file() else b""
    return noted.decode() if re.fullmatch(rb"[0-9a-f]{%d}" % DIGITS, noted) else ""


def write_event(event: dict[str, Any]) -> str:
    """An event as its line has it, but for the time and the seal."""
    return redact(json.dumps(event, ensure_ascii=False, default=str))


def read_log(directory: Path) -> Iterator[bytes]:
    """The lines of `events.jsonl` without seals and ends; the last may be one that a crash cut short.

    Raises BrokenSeal at one that is not what was written.
    """
    return (line for line, _ in _read_log(directory))


def _read_log(directory: Path) -> Iterator[tuple[bytes, str]]:
    path = directory / "events.jsonl"
    if not path.is_file():
        return
    made = read_made(directory)
    try:
        with path.open("rb") as lines:
            yield from check_lines(lines, made.log, sealed=bool(made.mark))
    except ValueError as error:
        raise BrokenSeal(
            f"line {error} of {path} is damaged: it does not match its seal; {advise(directory)}"
        ) from error


def read_last_seal(directory: Path) -> str:
    """The seal of the last line of the log; "" where that has none, as one that a crash cut short."""
    last = ""
    for _, last in _read_log(directory):  # noqa: B007, whose value is used: no list of a long log is made
        pass
    return last


def is_torn(directory: Path) -> bool:
    """Whether the last line of the log was cut short, by a crash or otherwise."""
    return bool(read_made(directory).mark) and any(read_log(directory)) and not read_last_seal(directory)


def scan_events(directory: Path, *types: str) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line from 0, event) of every event of these types, without lines that a kill cut short.

    Parses no more than it must: prompts and replies are very long. Raises BrokenSeal.
    """
    found, marks = [], [f'"type": "{type_}"'.encode() for type_ in types]
    for number, line in enumerate(read_log(directory)):
        if any(mark in line[:100] for mark in marks):
            with suppress(ValueError):
                found.append((number, json.loads(line)))
    return found


def check_log(directory: Path) -> None:
    """Raises BrokenSeal where the log lacks what a run wrote last, or had written when it came to its result."""
    result, path = read_result(directory), directory / "events.jsonl"
    check_logged(directory, result.get("log", "") if result else "", _read_noted(directory))
    empty = not path.is_file() or not path.stat().st_size
    if empty and read_made(directory).mark and (directory / "artifacts").is_dir():
        raise _explain_short(directory)


def refuse_lost_result(directory: Path) -> None:
    """Raises BrokenSeal where the log tells of a result, and `summary.json` is gone."""
    path = directory / "summary.json"
    if not path.is_file() and scan_events(directory, "result"):
        raise BrokenSeal(f"{path} is missing; {advise(directory)}")


def check_logged(directory: Path, *seals: str) -> None:
    """Raises BrokenSeal where the log has not all lines that the seals are of; "" is of none."""
    wanted = set(seals) - {""}
    if wanted and not wanted.issubset(seal for _, seal in _read_log(directory)):
        raise _explain_short(directory)


def _explain_short(directory: Path) -> BrokenSeal:
    return BrokenSeal(f"{directory / 'events.jsonl'} is damaged: what was written last is missing; {advise(directory)}")
