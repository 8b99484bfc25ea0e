"""Sums that wait until others have been made that they are added to: in memory where it has room, else on disk."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from tools.base.memory import has_room
from tools.models.mapped import Mapped, map_tensors
from tools.statistics.shards import Sums


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
