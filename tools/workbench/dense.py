"""The dense weights beside the model: on disk, mapped into memory.

What is read of them stays in memory as long as there is room and goes first where there is none, for it can be read
again: no second model is held.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tools.base.files import explain_full_disk, explain_unwritable

ALIGNED = 64
"""Each tensor begins at a multiple of so many bytes."""


def map_weights(weights: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Copies of weights of any shape, dtype and device, on the CPU, in a file of `directory` that has no name.

    The file ends with the process, or with the last of the copies. They may be written to: the file stays as it is.
    Raises DiskFull, or another UserError in one line, where it cannot be written.
    """
    with explain_unwritable(f"the dense weights in {directory}"), explain_full_disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".dense-") as file:
            places = {}
            for name, weight in weights.items():
                file.write(bytes(-file.tell() % ALIGNED))
                places[name] = file.tell()
                file.write(weight.to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
            if not (size := file.tell()):
                return {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
            held = torch.from_file(file.name, shared=False, size=size, dtype=torch.uint8)
    return {name: _view(held, places[name], weight) for name, weight in weights.items()}


def _view(held: Tensor, place: int, like: Tensor) -> Tensor:
    return held[place : place + like.nbytes].view(like.dtype).view(like.shape)
