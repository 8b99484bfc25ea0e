"""Gradients on their way down, and the powers of two that they are multiplied with in a model of fp16.

fp16 knows nothing below 6e-8 and nothing above 65504, and the gradient of a mean over two thousand tokens is largely
below. So what flows back through a block begins with `LARGEST` in its largest entry, and is divided again where it is
summed up. In other dtypes the power is 1, and no bit is changed by it.

Shape suffixes: T tokens, I input features (d_in), O output features (d_out).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tools.base.errors import UnknownStatistics

LARGEST = 2.0**8
"""What the largest entry is brought to just below: as far from what fp16 cannot hold as it may grow within a block."""

OVERFLOW = "is not finite in fp16; use --dtype bf16 or fp32"
"""What is said of it where nothing helps."""

_LOWER = 2.0**-8
"""What is left of a gradient that overflowed, to try it again."""

_TRIALS = 3


class Pair(NamedTuple):
    """What a layer read and what flowed back to it, of one window."""

    x_TI: Tensor
    g_TO: Tensor
    """The gradient of -log p of drawn labels, times `scale`."""
    scale: float
    mark: str = ""
    """Of its window, as in `Walk.mark`."""

    def move(self, device: torch.device | str) -> "Pair":
        """The same there; where it is already, itself."""
        return self._replace(x_TI=self.x_TI.to(device), g_TO=self.g_TO.to(device))


@dataclass
class Seen:
    """What flowed back through one block, by shard and layer."""

    pairs: dict[int, dict[str, list[Pair]]]
    language: dict[int, dict[str, float]]
    """Mean over the weights of |dL/dW| of the language modelling loss, summed over the windows of each mark."""


class Gradient(NamedTuple):
    """What flows back."""

    values: Tensor
    """Times `scale`."""
    scale: float = 1.0
    """A power of two."""


def scale_losses(tokens: int) -> tuple[float, float]:
    """What a sum of losses over tokens, and their mean over all but one of the `tokens`, are multiplied with in fp16.

    The gradient of either at the logits is then at most LARGEST, at any token.
    """
    return LARGEST, LARGEST * 2.0 ** math.floor(math.log2(tokens - 1))


def flow_back(
    output: Tensor,
    given: Tensor,
    above: Gradient,
    forget: Callable[[], None],
    *,
    scaled: bool,
    again: bool = False,
) -> Gradient:
    """The gradient at `given`, of which `output` was made; the graph is kept to go `again`.

    Where gradients are `scaled`, one that overflows is tried again on a smaller scale, once what hooks saw of it is
    forgotten. Raises UnknownStatistics when none is finite.
    """
    values, scale = above.values.to(output.device), above.scale
    for _ in range(_TRIALS):
        [below] = torch.autograd.grad(output, given, values, retain_graph=again or scaled)
        if not scaled or below.isfinite().all():
            return Gradient(below, scale)
        forget()
        values, scale = values * _LOWER, scale * _LOWER
    raise UnknownStatistics(f"what flows back through a block {OVERFLOW}")


def bring_near(gradient: Gradient, *, scaled: bool) -> Gradient:
    """The same gradient on the CPU; where it is `scaled`, its largest entry just below LARGEST."""
    values, scale = gradient.values.cpu(), gradient.scale
    largest = float(values.abs().max()) if scaled else 0.0
    if not largest:
        return Gradient(values, scale)
    factor = LARGEST / 2.0 ** math.frexp(largest)[1]
    return Gradient((values.float() * factor).to(values.dtype), scale * factor)
