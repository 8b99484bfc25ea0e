"""A run's directory: its lock, and its log of events."""

import hashlib
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tools.base.errors import DamagedFile, UserError
from tools.base.files import explain_full_disk, hash_file, read_json, write_bytes
from tools.base.options import read_yaml
from tools.base.secrets import redact

FORMAT = 2
"""Of a run's files. Those of another format are refused."""


def read_made(directory: Path) -> dict[str, Any]:
    """`run.json`. Raises DamagedFile, and UserError where it is missing or of another format."""
    path = directory / "run.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: what it belongs to is no run of this version of Billhook; begin it again")
    made = read_json(path, advise(directory))
    if made.get("format") != FORMAT:
        raise UserError(f"run {directory.name!r} is of another version of Billhook; begin it again")
    return made


def advise(directory: Path) -> str:
    """What to do about a file of a run that cannot be made again."""
    return f"put it back as it was, or make the run again with --config {directory / 'config.yaml'}"


def read_config_values(directory: Path) -> dict[str, Any]:
    """`config.yaml` of a run. Raises UserError where it cannot be read, or is not what the run was begun with."""
    begun, values = read_made(directory)["config"], read_yaml(directory / "config.yaml")
    if changed := [name for name, value in begun.items() if values.get(name) != value]:
        what = f"its config.yaml is not what the run was begun with ({', '.join(changed[:5])})"
        raise DamagedFile(f"run {directory.name!r} cannot be read: {what}")
    return values


def read_result(directory: Path) -> dict[str, Any] | None:
    """`summary.json` of a run; None where there is none. Raises DamagedFile, and UserError as `read_made`."""
    path = directory / "summary.json"
    if not path.is_file():
        return None
    read_made(directory)
    return read_json(path, advise(directory))


def hash_once(path: Path) -> str:
    """As `hash_file`, of a file that is not read again while its time and size are what they were."""
    return _hash_once(path.absolute(), path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash_once(path: Path, _changed: int, _size: int) -> str:
    """A command asks several times where a model is, and models are large."""
    return hash_file(path)


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory, by name."""
    return {path.name: hash_once(path) for path in sorted(directory.iterdir()) if path.is_file()}


def check_model(directory: Path) -> None:
    """Raises DamagedFile where a file of a run's `model/` is not what the run wrote."""
    result = read_result(directory)
    for name, digest in (result.get("files", {}) if result else {}).items():
        path = directory / "model" / name
        if not path.is_file() or hash_once(path) != digest:
            what = "is damaged: its content does not match its hash" if path.is_file() else "is missing"
            raise DamagedFile(f"{path} {what}; {advise(directory)}")


RUNS_DIR_VARIABLE = "BILLHOOK_RUNS_DIR"

LAST = ".last"
"""The file beside the log that has the hash of the line that was written last."""

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
    """Add one line to `events.jsonl`, with the time, and without any secret of the environment."""
    line = f'{{"time": {round(time.time(), 3)}, {write_event(event)[1:]}'.encode()
    path = directory / "events.jsonl"
    with explain_full_disk(path), path.open("a+b") as file:
        end = file.tell()
        file.seek(max(0, end - 1))
        file.write(b"\n" * (end > 0 and file.read() != b"\n") + line + b"\n")  # behind one that a crash cut short
        file.flush()
        os.fsync(file.fileno())  # a state that knows the line may be on the disk when the power fails
        (directory / LAST).write_bytes(_hash_line(line))


def rewrite_log(directory: Path, lines: Sequence[bytes]) -> None:
    """Make these lines, JSON objects without ends of line, the whole log."""
    (directory / LAST).unlink(missing_ok=True)  # a kill leaves none rather than that of a line that is no more
    write_bytes(directory / "events.jsonl", b"".join(line + b"\n" for line in lines))
    (directory / LAST).write_bytes(_hash_line(lines[-1]))


def _hash_line(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode()


def write_event(event: dict[str, Any]) -> str:
    """An event as its line has it, but for the time."""
    return redact(json.dumps(event, ensure_ascii=False, default=str))


def read_log(directory: Path) -> Iterator[bytes]:
    """The lines of `events.jsonl` without their ends; the last may be one that a crash cut short."""
    path = directory / "events.jsonl"
    if path.is_file():
        with path.open("rb") as lines:
            yield from (line.rstrip(b"\n") for line in lines)


def scan_events(directory: Path, *types: str) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line from 0, event) of every event of these types, without lines that a kill cut short.

    Parses no more than it must: prompts and replies are very long.
    """
    found, marks = [], [f'"type": "{type_}"'.encode() for type_ in types]
    for number, line in enumerate(read_log(directory)):
        if any(mark in line[:100] for mark in marks):
            with suppress(ValueError):
                found.append((number, json.loads(line)))
    return found


def check_log(directory: Path) -> None:
    """Raises DamagedFile where the log lacks the line that was written last, or has another in its place.

    A crash may leave one more line than was noted, or the beginning of one.
    """
    path = directory / LAST
    noted = path.read_bytes() if path.is_file() else b""
    if len(noted) == len(_hash_line(b"")) and noted not in map(_hash_line, deque(read_log(directory), maxlen=2)):
        log = directory / "events.jsonl"
        raise DamagedFile(f"{log} is damaged: what was written last is missing; {advise(directory)}")


def refuse_lost_result(directory: Path) -> None:
    """Raises DamagedFile where the log tells of a result, and `summary.json` is gone."""
    path = directory / "summary.json"
    if not path.is_file() and scan_events(directory, "result"):
        raise DamagedFile(f"{path} is missing; {advise(directory)}")
