"""The safetensors files that a model is read from, mapped: weights that they have as they were loaded need no copy."""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tools.base.names import is_hub_id
from tools.models.layers import Layer
from tools.models.mapped import Mapped, Place, map_tensors

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
