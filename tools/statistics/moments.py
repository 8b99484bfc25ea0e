"""What the layers of a block read, summed up.

Shape suffixes: T tokens, I input features (d_in).
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.statistics import add_second_moment, sum_squares
from tools.base.memory import has_room
from tools.models.layers import Layer
from tools.models.mapped import Mapped, map_tensors
from tools.statistics.shards import Sums, add_count


class Waiting:
    """Sums over some shards, on no GPU any more: in CPU memory, or in a file without a name."""

    def __init__(self, sums: Sums, scratch: Path) -> None:
        """Empties `sums`. Raises UserError where the file cannot be written in the directory `scratch`."""
        self._devices = {name: tensor.device for name, tensor in sums.items()}
        self._waiting: Mapping[str, Tensor]
        if has_room(sum(tensor.nbytes for tensor in sums.values())):
            self._waiting = {name: tensor.cpu() for name, tensor in _take_each(sums)}
        else:
            self._waiting = map_tensors(_take_each(sums), scratch, "sums over shards")

    def add(self, others: Sums) -> Sums:
        """With those of later shards, which are changed: the same bits as of sums that were held."""
        both: Sums = {}
        for name, device in self._devices.items():
            waited = self._waiting[name].to(device)
            both[name] = others.pop(name).add_(waited) if name in others else waited.clone()
            if isinstance(self._waiting, Mapped):
                self._waiting.let_go([name])
        return both | others


def _take_each(sums: Sums) -> Iterator[tuple[str, Tensor]]:
    for name in list(sums):
        yield name, sums.pop(name)


class Readers:
    """Which layers of a block read the same tensor, found while they run one after another."""

    def __init__(self, group: dict[str, str]) -> None:
        """`group` is filled, in the order in which layers first run: the first layer of those that read with each."""
        self.group = group
        self._last: tuple[str, Tensor | None] = ("", None)

    def find_leader(self, layer: Layer, x_TI: Tensor) -> str:
        """The first layer that reads what this one does, which runs now and may be itself."""
        known = self._last[1]
        shares = known is not None and known.data_ptr() == x_TI.data_ptr() != 0 and known.shape == x_TI.shape
        leader = self.group.setdefault(layer.name, self._last[0] if shares else layer.name)
        if leader == layer.name:
            self._last = (leader, x_TI)
        return leader


class Wanted(NamedTuple):
    """What is to be summed."""

    full: bool
    """x x^T, and not x^2 alone."""
    group: dict[str, str]
    """As in `Readers`."""


class Spare:
    """Second moments that were added to others, whose memory those to come take: of a system that clears what it hands
    out page by page large ones come no faster than they are summed."""

    def __init__(self) -> None:
        self._given: dict[tuple[int, torch.device], list[Tensor]] = {}

    def give(self, tensor: Tensor) -> None:
        """Of any sums; nobody else holds it."""
        if tensor.dim() == 2:
            self._given.setdefault((len(tensor), tensor.device), []).append(tensor)

    def take(self, width: int, device: torch.device) -> Tensor:
        """Zeros, (I, I), fp32."""
        given = self._given.get((width, device))
        return given.pop().zero_() if given else torch.zeros((width, width), device=device)


class MomentSums:
    """Sums over the windows of a shard: `A/LAYER`, `a/LAYER` and `n/LAYER`, as `Walks.moments` has them."""

    def __init__(self, wanted: Wanted, spare: Spare) -> None:
        self.sums: Sums = {}
        self.share = 1.0
        """What the window counts that runs."""
        self._wanted, self._readers, self._spare = wanted, Readers(wanted.group), spare

    def see(self, layer: Layer, x_TI: Tensor) -> None:
        """Add what a layer reads."""
        if self._readers.find_leader(layer, x_TI) == layer.name:
            self._add(layer, x_TI, full=self._wanted.full)

    def _add(self, layer: Layer, x_TI: Tensor, *, full: bool) -> None:
        sums, width, name = self.sums, x_TI.shape[1], f"A/{layer.name}" if full else f"a/{layer.name}"
        if self.share != 1:
            x_TI = x_TI.float() * math.sqrt(self.share)
        if name not in sums:
            device = x_TI.device
            sums[name] = self._spare.take(width, device) if full else torch.zeros(width, device=device)
        if full:
            add_second_moment(sums[name], x_TI)
        else:
            sums[name] += sum_squares(x_TI)
        if layer.pool:
            add_count(sums, layer.name, x_TI)
