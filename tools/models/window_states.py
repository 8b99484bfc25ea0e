"""What windows of text pass on from one block to the next: in memory, or on disk where there is no room for them."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tools.base.memory import has_room
from tools.models.mapped import Mapped, map_tensors
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
