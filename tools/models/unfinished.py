"""What is kept of long work that may be killed: tensors with values beside them, in files."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from tools.base.files import KEEP_SECONDS, hash_file, write_text, write_whole
from tools.models.tensor_file import Form, write_tensors

UNFINISHED = "unfinished"
"""The directory within a run's, while there is anything in it."""

_VALUES = "kept.json"


class Marks(NamedTuple):
    """Names of the weights in a model."""

    below: Sequence[str]
    """For each block, those of all blocks before it."""
    every: str
    """Those of all blocks."""


class KeptFiles:
    """Tensors and values in a directory, the last ones that were kept."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._kept = directory, time.monotonic()

    @property
    def are_due(self) -> bool:
        """Whether it is `KEEP_SECONDS` since these were kept, or since this began."""
        return time.monotonic() - self._kept >= KEEP_SECONDS

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """(values, tensors); None where there are none, or a file is gone or damaged."""
        values = self._read_values()
        if values is None:
            return None
        path = self.directory / values["tensors"]
        if not path.is_file() or hash_file(path) != path.stem:
            return None
        return values, load_file(path)

    def replace(self, tensors: Mapping[str, Tensor], **values: Any) -> None:
        """Keep these in the place of what was kept before, which is deleted once they are whole. Raises DiskFull."""
        before, made = self._read_values(), self.directory / "kept.safetensors"
        forms = {name: Form(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        write_whole(made, lambda path: write_tensors(path, forms, tensors.items(), dict))
        path = made.rename(self.directory / f"{hash_file(made)}.safetensors")
        write_text(self.directory / _VALUES, json.dumps({**values, "tensors": path.name}))
        if before is not None and before["tensors"] != path.name:
            (self.directory / before["tensors"]).unlink(missing_ok=True)
        self._kept = time.monotonic()

    def _read_values(self) -> dict[str, Any] | None:
        path = self.directory / _VALUES
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found["tensors"], str) else None
        except (ValueError, KeyError, TypeError):  # a crash of the machine may leave a file empty
            return None


def forget_files(directory: Path) -> None:
    """Delete what was kept in a directory, and the one that it is in where nothing else is."""
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        directory.parent.rmdir()


def forget_all(run: Path, prefix: str) -> None:
    """`forget_files` of all whose directories begin so, in that of a run."""
    for directory in (run / UNFINISHED).glob(f"{prefix}*"):
        forget_files(directory)
