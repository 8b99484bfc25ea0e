"""A safetensors file that is written a tensor at a time, so that none but the one that is written needs memory."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

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
