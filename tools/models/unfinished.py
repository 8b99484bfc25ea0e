"""What is kept of long work that may be killed: tensors with values beside them, in files."""

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tools.base.files import KEEP_SECONDS, hash_file, write_text, write_whole
from tools.models.mapped import view_bytes


class Form(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many it has."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: Path,
    forms: Mapping[str, Form],
    tensors: Iterable[tuple[str, Tensor]],
    describe: Callable[[], Mapping[str, str]],
) -> None:
    """Write tensors, of any device, in whatever order they come; `forms` are those of all of them, by name.

    `describe` makes the file's metadata: before the first tensor, when hashes that it names may be any others of their
    length, and behind the last. Raises ValueError where a tensor or the metadata is not as was said, OSError.
    """
    places, begin = dict[str, tuple[int, int]](), 0
    for name in sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name)):  # each at a multiple of its item
        places[name], begin = (begin, begin + forms[name].bytes), begin + forms[name].bytes
    left = dict(forms)
    with path.open("wb") as file:
        head = len(_make_header(forms, places, describe()))
        for name, tensor in tensors:
            if left.pop(name, None) != (tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, which nobody had said of it")
            file.seek(head + places[name][0])
            file.write(view_bytes(tensor))
        header = _make_header(forms, places, describe())
        if left or len(header) != head:
            raise ValueError(f"{', '.join(left) or 'the metadata'} came out otherwise than was said")
        file.seek(0)
        file.write(header)


def _make_header(
    forms: Mapping[str, Form], places: Mapping[str, tuple[int, int]], metadata: Mapping[str, str]
) -> bytes:
    """The file up to its first tensor: a length, and JSON with spaces up to a multiple of eight bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} | {
        name: {"dtype": _name(forms[name].dtype), "shape": forms[name].shape, "data_offsets": place}
        for name, place in places.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@functools.cache
def _name(dtype: torch.dtype) -> str:
    """What the format calls a dtype, as its library writes it."""
    name: str = json.loads(save({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"]
    return name


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
