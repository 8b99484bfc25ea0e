"""Tensors on disk, mapped into memory.

What is read of them stays in memory as long as there is room and goes first where there is none, for it can be read
again: no second model is held, and of one whose blocks are streamed not even the first.
"""

import json
import mmap
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tools.base.files import explain_full_disk, explain_unwritable
from tools.base.named import is_hub_id
from tools.models.layers import Layer

ALIGNED = 64
"""Each tensor begins at a multiple of so many bytes."""


class Place(NamedTuple):
    """Where a tensor lies, row by row."""

    held: mmap.mmap
    """The file; one that others know by a name is mapped to be read alone."""
    begin: int
    """Bytes of the file before it."""
    dtype: torch.dtype
    shape: torch.Size

    @property
    def bytes(self) -> int:
        """How many it has."""
        return self.shape.numel() * self.dtype.itemsize


class Mapped(Mapping[str, Tensor]):
    """Tensors of files, by their names, on the CPU."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.groups: Mapping[str, int] = {}
        """Where it is given, whoever takes a tensor lets go of those of the group that one was taken of before."""
        self.places = dict(places)
        """By name."""
        self._last = ""
        self._tensors = {name: _view(place) for name, place in self.places.items()}

    def __getitem__(self, name: str) -> Tensor:
        if self._last and self.groups.get(self._last) != self.groups.get(name):
            self.let_go([other for other, group in self.groups.items() if group == self.groups[self._last]])
        self._last = name
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def let_go(self, names: Iterable[str]) -> None:
        """Take what was read of some of them out of this process' memory; they are read again when they are used.

        What was written stays, in the file. Does nothing where the system cannot do it.
        """
        self._advise("MADV_DONTNEED", names)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read some of them from disk meanwhile. Does nothing where it cannot do it."""
        self._advise("MADV_WILLNEED", names)

    def _advise(self, advice: str, names: Iterable[str]) -> None:
        if not hasattr(mmap, advice):
            return
        for name in names:
            place = self.places[name]
            begin = place.begin // mmap.PAGESIZE * mmap.PAGESIZE
            if place.bytes:
                place.held.madvise(getattr(mmap, advice), begin, place.begin + place.bytes - begin)


def view_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any shape, dtype and device, row by row: of itself where it lies so on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _view(place: Place) -> Tensor:
    """With a storage of its own: to whoever writes tensors to a file, two of one storage are tied."""
    if not place.bytes:
        return torch.empty(place.shape, dtype=place.dtype)
    count = place.shape.numel()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nor is it written to
        return torch.frombuffer(place.held, dtype=place.dtype, count=count, offset=place.begin).view(place.shape)


def map_tensors(tensors: Iterable[tuple[str, Tensor]], directory: Path, what: str = "the dense weights") -> Mapped:
    """Copies of tensors of any shape, dtype and device, one after another, in a file of `directory` without a name.

    The file ends with the process, or with the last of the copies; what is written to them goes to the file. Raises
    DiskFull, or another UserError in one line, where it cannot be written.
    """
    written: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
    with _explained(what, directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed below
    with file:
        for name, tensor in tensors:  # which may come of work that has errors of its own
            with _explained(what, directory):
                file.write(bytes(-file.tell() % ALIGNED))
                written[name] = file.tell(), tensor.dtype, tensor.shape
                file.write(view_bytes(tensor))
        with _explained(what, directory):
            file.write(bytes(1))  # a file without any bytes cannot be mapped
            file.flush()
            # not as a private copy, for which Linux wants as much memory as it is long
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE)
            return Mapped({name: Place(held, *where) for name, where in written.items()})


@contextmanager
def _explained(what: str, directory: Path) -> Iterator[None]:
    with explain_unwritable(f"{what} in {directory}"), explain_full_disk(directory):
        yield


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Number formats that models run in, as the headers of files name them."""


def map_source(path: str) -> Mapped:
    """The tensors of a model's files by their names there, to be read alone: a directory's, or a hub id's on this
    machine.

    Of the number formats of DTYPES, and those that begin at a multiple of a number's bytes. Nothing is read but
    headers; where those cannot be read, or are not here, there are no tensors.
    """
    with suppress(OSError, ValueError, KeyError, SafetensorError):
        return Mapped({name: place for file in _find_files(path) for name, place in _list_places(file)})
    return Mapped({})


def _find_files(path: str) -> list[Path]:
    """Those that transformers would read. Raises KeyError or ValueError for a broken index."""
    if whole := _find_file(path, SAFE_WEIGHTS_NAME):
        return [whole]
    if (index := _find_file(path, SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    shards = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [file for shard in shards if (file := _find_file(path, shard))]


def _find_file(path: str, name: str) -> Path | None:
    if os.path.isdir(path) or not is_hub_id(path):
        file = Path(path, name)
        return file if file.is_file() else None
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(path, name)
    return Path(found) if isinstance(found, str) else None


def _list_places(file: Path) -> Iterator[tuple[str, Place]]:
    """Raises SafetensorError or OSError for what is no such file."""
    with safe_open(file, "np"):  # refuses a header that does not fit its file; "pt" a file larger than the memory, too
        pass
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        held = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype, begin = DTYPES.get(entry["dtype"]), 8 + size + entry["data_offsets"][0]
        if dtype is not None and begin % dtype.itemsize == 0:
            yield name, Place(held, begin, dtype, torch.Size(entry["shape"]))


def has_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU are of one dtype and shape, and the same bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (one, other)))


def list_in_source(layers: Sequence[Layer], source: Mapped) -> set[str]:
    """Names of the layers that have a tensor of their own name, dtype and shape in a model's files.

    Not those of experts, which may stand there one by one and are one tensor in the model, nor a Conv1D, whose weight
    is a view.
    """
    return {
        layer.name
        for layer in layers
        if isinstance(layer.module, nn.Linear)
        and (place := source.places.get(f"{layer.name}.weight"))
        and (place.dtype, place.shape) == (layer.weight_OI.dtype, layer.weight_OI.shape)
    }


def map_dense(layers: Sequence[Layer], directory: Path, source: Mapped | None = None) -> Mapped:
    """The weights of layers as they are now, (O, I), by the names of the layers, in their order.

    They lie where the `source`, which has nothing but what was loaded, has them, others in a file of `directory`
    without a name. Raises as `map_tensors`.
    """
    source = source or Mapped({})
    there = list_in_source(layers, source)
    places = map_tensors(((x.name, x.weight_OI) for x in layers if x.name not in there), directory).places
    places |= {name: source.places[f"{name}.weight"] for name in there}
    return Mapped({layer.name: places[layer.name] for layer in layers})
