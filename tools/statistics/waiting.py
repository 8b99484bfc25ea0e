"""Sums that wait on disk until others have been made that they are added to."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tools.models.mapped import map_tensors
from tools.statistics.shards import Sums


class Waiting:
    """Sums over some shards, in a file without a name; none of them is held any more."""

    def __init__(self, sums: Sums, scratch: Path) -> None:
        """Empties `sums`. Raises UserError where the file cannot be written in the directory `scratch`."""
        self._devices = {name: tensor.device for name, tensor in sums.items()}
        self._mapped = map_tensors(_take_each(sums), scratch, "sums over shards")

    def add(self, others: Sums) -> Sums:
        """With those of later shards, which are changed: the same bits as of sums that were held."""
        both: Sums = {}
        for name, device in self._devices.items():
            waited = self._mapped[name].to(device)
            both[name] = others.pop(name).add_(waited) if name in others else waited.clone()
            self._mapped.let_go([name])
        return both | others


def _take_each(sums: Sums) -> Iterator[tuple[str, Tensor]]:
    for name in list(sums):
        yield name, sums.pop(name)
