"""The weights that a polish may change: those of all pruned layers that are not zero, as one vector for each layer.

Shape suffixes: O output features, I input features, S survivors of a layer, row by row.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.guard import mend_lost
from billhook_kernels.kept import gather_kept, spread_kept
from tools.base.errors import BrokenPlan
from tools.base.memory import count_free
from tools.models.layers import Layer
from tools.plans.polish import Means

Vectors = dict[str, Tensor]
"""By layer name, (S,); fp32, where `Survivors` keeps them."""

STATE_SHARE = 0.5
"""Share of the memory free on a GPU, or in CPU memory, that what a polish keeps of each survivor may take there; the
gradients of a step, the marks of what survives and a walk need room beside it."""

MEAN_BYTES: dict[Means, int] = {"fp32": 4, "bf16": 2}
"""Of one mean of a survivor."""


class Place(NamedTuple):
    """Where what a polish keeps of each survivor lies, and in which format."""

    away: bool
    """Whether it lies in CPU memory, wherever the weights are."""
    means: Means


class Survivors:
    """Which weights of the model are not zero now, and for good."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)
        self.keep = {layer.name: layer.weight_OI != 0 for layer in self.layers}
        """bool, (O, I), on the layer's device."""
        self.written = 0
        """How often weights were put into the model."""

    def gather(self, name: str, full_OI: Tensor) -> Tensor:
        """The survivors' entries of a tensor of a layer's shape: (S,)."""
        return gather_kept(full_OI, self.keep[name])

    @cached_property
    def place(self) -> Place:
        """Where vectors are kept, and in which format means: by what was free when this was first asked."""
        wanted = Counter[torch.device]()
        for layer in self.layers:
            kept = int(torch.count_nonzero(self.keep[layer.name]))
            wanted[layer.weight_OI.device] += kept * count_state_bytes(layer.weight_OI.element_size(), "fp32")
        free = count_free()
        return place_state([(size, _count_free_on(device, free)) for device, size in wanted.items()], free)

    def read(self) -> Vectors:
        """Those in the model, as fp32."""
        return {
            layer.name: self.gather(layer.name, layer.weight_OI)
            .to("cpu" if self.place.away else layer.weight_OI.device)
            .float()
            for layer in self.layers
        }

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put survivors into the model, in its number format; all other weights of the layers are zero.

        Those that come out as exactly 0 become the least normal number, as in `guard.finish_update`: zeros stay
        as many as they were. Raises BrokenPlan where one is not finite.
        """
        for layer in self.layers:
            layer.write(self.spread(layer, values[layer.name]))
        self.written += 1

    def spread(self, layer: Layer, values_S: Tensor) -> Tensor:
        """The weight that survivors stand for, (O, I), as `write` puts it into the model."""
        dtype = layer.weight_OI.dtype
        stored_S = values_S.to(dtype)
        if not bool(torch.isfinite(stored_S).all()):
            raise BrokenPlan(f"polish: the weights of layer {layer.name} are not finite")
        stored_S = mend_lost(stored_S, stored_S == 0)
        keep_OI = self.keep[layer.name]
        return spread_kept(stored_S.to(keep_OI.device), keep_OI)


def count_state_bytes(item: int, means: Means) -> int:
    """Bytes that a polish keeps of each survivor, of a model with so many a weight: itself in fp32, two means, and the
    best so far."""
    return 4 + 2 * MEAN_BYTES[means] + item


def place_state(wanted: Sequence[tuple[int, float]], free: float) -> Place:
    """Where what is kept fits: with the weights, else in CPU memory, where `free` bytes are free, else there with means
    in bf16.

    `wanted` are, for each device with weights, the bytes that is kept of theirs with means in fp32, and those free on
    it.
    """
    if all(size <= STATE_SHARE * there for size, there in wanted):
        return Place(away=False, means="fp32")
    fits = sum(size for size, _ in wanted) <= STATE_SHARE * free
    return Place(away=True, means="fp32" if fits else "bf16")


def _count_free_on(device: torch.device, free: int) -> int:
    """Bytes free on a device with weights, where so many are in CPU memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free
