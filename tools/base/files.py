"""Files that are either whole or absent: written aside, then renamed; no pickle anywhere."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.base.errors import DamagedArtifact, DamagedFile, DiskFull, UserError
from tools.base.words import show_size

KEEP_SECONDS = 60.0
"""How old what is kept of unfinished work may be, but for the step or the block under way."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it there. DiskFull when no space is left.

    Its bytes are on the disk before it has its name, for a state that names it may be there when the power fails.
    """
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        aside = Path(name)
        try:
            write(aside)
            aside.chmod(0o644)  # mkstemp's 0600 would keep a model from being shared
            _flush(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory beside `directory`, then put it in its place. DiskFull when no space is left."""
    aside, former = (directory.with_name(f".{directory.name}.{which}") for which in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with explain_full_disk(directory):
            with explain_unwritable(directory):
                aside.mkdir(parents=True)
            write(aside)
            for path in aside.rglob("*"):
                if path.is_file():
                    _flush(path)  # as of `write_whole`: a summary vouches for the files of a model
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in aside.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner can read
    if directory.exists():
        shutil.rmtree(former, ignore_errors=True)
        directory.rename(former)
    aside.rename(directory)
    shutil.rmtree(former, ignore_errors=True)


def refuse_unwritable(directory: Path) -> None:
    """Raises UserError where `write_directory` could not write a directory, before there is anything to write."""
    with explain_unwritable(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}."):
            pass


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn an error that says that no space is left for `path` into DiskFull."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(next(place for place in path.absolute().parents if place.exists())).free
        raise DiskFull(
            f"the disk is full ({show_size(free, 'MB', 0)} free) while writing {path}; free some space, then go on: "
            "a run with --resume, any other command as before"
        ) from error


@contextmanager
def explain_unwritable(what: object) -> Iterator[None]:
    """Turn an error of the operating system into UserError: `what` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, from Python, safetensors or SQLite, says that no space is left."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error) or "database or disk is full" in str(error)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    write_whole(path, lambda aside: aside.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object that a JSON file holds. Raises DamagedFile, with the `advice`, where it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: it is not JSON; {advice}") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is damaged: it is not a JSON object; {advice}")
    return value


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_artifact(directory: Path, digest: str, suffix: str) -> Path:
    """A file that is named by the hash of its content, which is checked. Raises DamagedArtifact."""
    path = directory / digest[:2] / f"{digest}{suffix}"
    if not path.is_file():
        raise DamagedArtifact(f"artifact {path} is missing")
    if hash_file(path) != digest:
        raise DamagedArtifact(f"artifact {path} is damaged: its content does not match its hash")
    return path
