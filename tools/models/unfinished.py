"""What is kept of long work that may be killed: tensors with values beside them, in files."""

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tools.base.files import KEEP_SECONDS, hash_file, write_text, write_whole
from tools.base.memory import has_room
from tools.models.mapped import Mapped, map_tensors, view_bytes
from tools.models.streamed import find_stream

States = MutableMapping[int, Tensor]
"""By window, (1, T, D) each, on CPU."""


def hold_states(model: Any, windows: Sequence[int], make: Callable[[int], Tensor]) -> States:
    """The states of windows as `make` has them, of any device; others of their form may take their place.

    Where the model is streamed and has no room beside it for them (`has_room`), they lie beside its weights in a file
    without a name, and what is read of them leaves memory where there is none left. Bytes come back as they were. A
    state that was taken is another once one was put in its place. Raises DiskFull, or another UserError in one line,
    where the file cannot be written.
    """
    if not windows:
        return {}
    first, stream = make(windows[0]).cpu(), find_stream(model)
    if stream is None or has_room(len(windows) * first.nbytes):
        return {window: make(window).cpu() if i else first for i, window in enumerate(windows)}
    made = ((f"{window}", make(window) if i else first) for i, window in enumerate(windows))
    return _StatesOnDisk(map_tensors(made, stream.scratch, "states between blocks"))


def stack_states(states: Mapping[int, Tensor]) -> Tensor:
    """(B, T, D) of all, in the order in which they were given: a copy where they are held, else a view of the file."""
    return states.stack() if isinstance(states, _StatesOnDisk) else torch.cat([*states.values()])


class _StatesOnDisk(MutableMapping[int, Tensor]):
    """By window; tensors that are taken are views of the file."""

    def __init__(self, mapped: Mapped) -> None:
        self._mapped = mapped

    def __getitem__(self, window: int) -> Tensor:
        return self._mapped[f"{window}"]

    def __setitem__(self, window: int, state: Tensor) -> None:
        self._mapped[f"{window}"].copy_(state)
        self._mapped.let_go([f"{window}"])

    def __delitem__(self, window: int) -> None:
        raise TypeError("states on disk are let go of together")

    def __iter__(self) -> Iterator[int]:
        return (int(name) for name in self._mapped)

    def __len__(self) -> int:
        return len(self._mapped)

    def stack(self) -> Tensor:
        """As `stack_states`."""
        places = [*self._mapped.places.values()]
        first, last = places[0], places[-1]
        item, (_, tokens, wide) = first.dtype.itemsize, first.shape
        count = (last.begin + last.bytes - first.begin) // item
        whole_N = torch.frombuffer(first.held, dtype=first.dtype, count=count, offset=first.begin)
        step = (last.begin - first.begin) // max(len(places) - 1, 1) // item  # as each begins at a multiple of ALIGNED
        return whole_N.as_strided((len(places), tokens, wide), (step, wide, 1))


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
