"""What every block reads, on disk: put there on the way up through the blocks, taken on the way down."""

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tools.base.files import explain_full_disk
from tools.models.mapped import view_bytes


class StateStack:
    """A stack of lists of tensors in a file without a name, which is gone with the stack, or with the process.

    Bytes come back as they were, on CPU. Raises DiskFull when no space is left.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open for as long as the stack is
        weakref.finalize(self, self._file.close)
        self._heights: list[tuple[int, list[tuple[torch.Size, torch.dtype]]]] = []

    @property
    def height(self) -> int:
        """How many lists lie on it."""
        return len(self._heights)

    def push(self, states: Sequence[Tensor]) -> None:
        """Put the states of one block on top."""
        with explain_full_disk(self._directory):
            begin = self._file.seek(0, 2)
            for state in states:
                self._file.write(view_bytes(state))
        self._heights.append((begin, [(state.shape, state.dtype) for state in states]))

    def pop(self) -> list[Tensor]:
        """Take what was put on top last."""
        begin, kinds = self._heights.pop()
        self._file.seek(begin)
        states = []
        for shape, dtype in kinds:
            bytes_N = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
            self._file.readinto(bytes_N.numpy().data)
            states.append(bytes_N.view(dtype).view(shape))
        self._file.truncate(begin)
        return states
