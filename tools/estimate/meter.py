"""What code takes: its tensors' bytes, and the operations of its products, counted while it runs.

Fake tensors, which have a shape and no memory, are counted as real ones are: that way a block of any size is counted
in a moment.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _ATTENTION,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
"""What torch counts on a GPU only, to what it counts there."""


class Meter(TorchDispatchMode):
    """Counts while it is entered. Tensors made before are not counted, nor are views of any."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        """Most bytes of tensors that were alive at once."""
        self.flops = 0
        """Floating-point operations of all products, two for each multiplication."""
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation of torch."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if made := self._find_made(result, (args, kwargs)):  # only then can more be alive than ever before
            self._live = {key: item for key, item in self._live.items() if not item[0].expired()} | made
            self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        self.flops += _count_flops(function, args, kwargs, result)
        return result

    def _find_made(self, result: Any, given: Any) -> dict[int, tuple[StorageWeakRef, int]]:
        """The memory of a result that no tensor before it lies in."""
        storages = {
            storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in _find_tensors(result))
        }
        # A reference, weak as it is, keeps an address from being used again: what is known is no new memory.
        if not (storages.keys() - self._live.keys()):
            return {}
        known = self._live.keys() | {tensor.untyped_storage()._cdata for tensor in _find_tensors(given)}
        return {
            key: (StorageWeakRef(storage), storage.nbytes()) for key, storage in storages.items() if key not in known
        }


def _count_flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = function._overloadpacket
    if packet == torch.ops.aten._grouped_mm:  # of experts, each for the tokens that are sent to it
        return int(2 * result.numel() * args[0].shape[-1])
    if packet in _ON_CPU:  # the same first arguments, other ones behind them
        count = flop_registry[_ON_CPU[packet]]
        shapes = 4 if "backward" in str(packet) else 3
        return int(count(*args[:shapes], out_val=result))
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0


def _find_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _find_tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _find_tensors(part)
