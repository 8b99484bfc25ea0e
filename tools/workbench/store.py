"""What a workbench keeps on disk: artifacts under the hash of their content, and an index of what was made.

A killed run goes on where it was: whatever it needs is found by what it depends on.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.base.errors import DamagedArtifact
from tools.base.files import explain_full_disk, find_artifact, hash_file, write_whole

if TYPE_CHECKING:
    from torch import Tensor

DENSE = "dense"
"""Id of the unpruned weights, as a checkpoint and as a layer's artifact."""


RESTED_NS = 2_000_000_000
"""Age of a file's last change from which another change would show in its times, which have the clock's ticks."""


class ArtifactStore:
    """Files named by the hash of their content; a file that does not match its name is never used.

    A file that was checked is not hashed again in this process until its size or times are others: every round reads
    the second moments of the whole model.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._checked: dict[Path, tuple[int, ...]] = {}

    def remove_unfinished(self) -> None:
        """Delete what a killed process was writing, whose names begin with a point; the caller holds the run's lock."""
        for path in self.directory.rglob(".*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

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
        return self._write(".json", lambda path: path.write_text(text, encoding="utf-8"))

    def read_json(self, digest: str) -> Any:
        """The JSON value of an artifact. Raises DamagedArtifact when it is missing or was changed."""
        return json.loads(self.check(digest, ".json").read_text(encoding="utf-8"))

    def check(self, digest: str, suffix: str) -> Path:
        """The artifact's path, its content checked against its hash. Raises DamagedArtifact."""
        path = self.path(digest, suffix)
        before = _mark_file(path)
        if before is None or self._checked.get(path) != before:
            find_artifact(self.directory, digest, suffix)
            if before is not None:
                self._checked[path] = before
        return path

    def has(self, digest: str, suffix: str) -> bool:
        """Whether the artifact is there and whole."""
        try:
            self.check(digest, suffix)
        except DamagedArtifact:
            return False
        return True

    def _write(self, suffix: str, write: Callable[[Path], object]) -> str:
        made = self.directory / f".new{suffix}"
        write_whole(made, write)
        digest = hash_file(made)
        target = self.path(digest, suffix)
        with explain_full_disk(target):
            target.parent.mkdir(exist_ok=True)
            made.replace(target)
        return digest


class Index:
    """What was made before, by a key of all that it depends on.

    A round looks for something in it for every layer: what was read once is not read again.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self.store, self._path = store, store.directory / "index.jsonl"
        self._known: dict[str, str] = {}
        self._read: tuple[int, int] = (0, 0)
        """The file, by its number, and how many of its bytes: all lines but the last, which a kill may have torn."""

    def read(self, suffix: str = ".safetensors") -> dict[str, str]:
        """Key to artifact, of files of this kind, without files that are gone or a line torn by a kill."""
        return {k: a for k, a in self._read_all().items() if self.store.path(a, suffix).is_file()}

    def _read_all(self) -> dict[str, str]:
        """Key to artifact, be it there or not; on a look at one key the files of all others are left alone."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self._known, self._read = {}, (0, 0)
            return self._known
        number, done = self._read
        if number != found.st_ino or found.st_size < done:
            self._known, done = {}, 0
        with self._path.open("rb") as file:
            file.seek(done)
            added = file.read()
        self._read = found.st_ino, done + added.rfind(b"\n") + 1
        for line in added.decode(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["artifact"]
            except (ValueError, KeyError, TypeError):
                continue
        return self._known

    def add(self, key: str, artifact: str) -> None:
        """Remember what was made."""
        with explain_full_disk(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": key, "artifact": artifact}))  # a torn line never swallows the next

    def measure_once(self, key: Sequence[str], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this key, from disk if it is there and whole."""
        value = self.read_measured(key)
        return self.keep_measured(key, measure()) if value is None else value

    def read_measured(self, key: Sequence[str]) -> dict[str, Any] | None:
        """As `measure_once`; None where it is not there."""
        artifact = self._read_all().get(_hash_key(key), "")
        return dict(self.store.read_json(artifact)) if artifact and self.store.has(artifact, ".json") else None

    def keep_measured(self, key: Sequence[str], value: dict[str, Any]) -> dict[str, Any]:
        """Keep a value under a key, and give it back."""
        self.add(_hash_key(key), self.store.write_json(value))
        return value

    def measure_files(self, key: Sequence[str], measure: Callable[[], dict[str, str]]) -> dict[str, str]:
        """As `measure_once`, of the artifacts of tensors, by name: all must still be there."""
        made = self.read_measured(key)
        if made is None or not all(self.store.has(artifact, ".safetensors") for artifact in made.values()):
            return self.keep_measured(key, measure())
        return made

    def replace_measured(self, key: Sequence[str], value: dict[str, Any]) -> None:
        """As `keep_measured`; the value before it is deleted once this is whole."""
        before = self._read_all().get(_hash_key(key), "")
        artifact = self.store.write_json(value)
        self.add(_hash_key(key), artifact)
        if before and before != artifact:
            self.store.path(before, ".json").unlink(missing_ok=True)

    def forget_measured(self, key: Sequence[str]) -> None:
        """Delete the value that was kept under a key, if there is one."""
        if artifact := self._read_all().get(_hash_key(key)):
            self.store.path(artifact, ".json").unlink(missing_ok=True)


def _mark_file(path: Path) -> tuple[int, ...] | None:
    """What tells a file from a changed one; None of one that is not there, or has just been changed."""
    try:
        found = path.stat()
    except OSError:
        return None
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    if time.time_ns() - changed < RESTED_NS:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash_key(key: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()
