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
from typing import TYPE_CHECKING, Any

from tools.base.errors import DamagedArtifact, DiskFull, UserError
from tools.base.words import show_size

if TYPE_CHECKING:
    from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it there. DiskFull when no space is left.

    Not flushed to the disk at once: what matters is checked against its hash when it is read.
    """
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        aside = Path(name)
        try:
            write(aside)
            aside.chmod(0o644)  # mkstemp's 0600 would keep a model from being shared
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory beside `directory`, then put it in its place. DiskFull when no space is left."""
    aside = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with explain_full_disk(directory):
            aside.mkdir(parents=True)
            write(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for file in aside.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


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
    write_whole(path, lambda aside: _write_utf8(aside, text))


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _write_utf8(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)


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


class ArtifactStore:
    """Files named by the hash of their content; a file that does not match its name is never used."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, digest: str, suffix: str) -> Path:
        """Where the artifact lies or would lie."""
        return self.directory / digest[:2] / f"{digest}{suffix}"

    def write_tensors(self, tensors: dict[str, "Tensor"]) -> str:
        """Write tensors (copied to CPU); the hash of the file."""
        from safetensors.torch import save_file  # imports torch

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return self._write(".safetensors", lambda path: save_file(contiguous, path))

    def read_tensors(self, digest: str) -> dict[str, "Tensor"]:
        """The tensors of an artifact. Raises DamagedArtifact when it is missing or was changed."""
        from safetensors.torch import load_file  # imports torch

        return load_file(self.check(digest, ".safetensors"))

    def write_json(self, value: Any) -> str:
        """Write a JSON value with sorted keys; the hash of the file."""
        text = json.dumps(value, sort_keys=True, allow_nan=False)
        return self._write(".json", lambda path: _write_utf8(path, text))

    def read_json(self, digest: str) -> Any:
        """The JSON value of an artifact. Raises DamagedArtifact when it is missing or was changed."""
        return json.loads(self.check(digest, ".json").read_text(encoding="utf-8"))

    def check(self, digest: str, suffix: str) -> Path:
        """The artifact's path, its content checked against its hash. Raises DamagedArtifact."""
        return find_artifact(self.directory, digest, suffix)

    def has(self, digest: str, suffix: str) -> bool:
        """Whether the artifact is there and whole."""
        try:
            self.check(digest, suffix)
        except DamagedArtifact:
            return False
        return True

    def _write(self, suffix: str, write: Callable[[Path], None]) -> str:
        made = self.directory / f".new{suffix}"
        write_whole(made, write)
        digest = hash_file(made)
        target = self.path(digest, suffix)
        with explain_full_disk(target):
            target.parent.mkdir(exist_ok=True)
            made.replace(target)
        return digest
