"""Gradients on their way down, and the powers of two that they are multiplied with in a model of fp16.

fp16 knows nothing below 6e-8 and nothing above 65504, and the gradient of a mean over two thousand tokens is largely
below. So what flows back through a block begins with `LARGEST` in its largest entry, and is divided again where it is
summed up. In other dtypes the power is 1, and no bit is changed by it.

Shape suffixes: T tokens, I input features (d_in), O output features (d_out).
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from billhook_kernels.statistics import clip_tokens, squared_loss_changes, sum_squares
from tools.base.errors import UnknownStatistics, explain_layer
from tools.models.layers import Layer
from tools.statistics.shards import Sums, add_count


@contextmanager
def tapped(
    layers: Iterable[Layer],
    on_input: Callable[[Layer, Tensor], object],
    on_gradient: Callable[[Layer, Tensor, Tensor], None] | None = None,
) -> Iterator[None]:
    """Hooks on layers: their inputs are seen in the forward pass, their output gradients in the backward pass."""

    def tap(layer: Layer) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def see(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_TI = inputs[0].detach().flatten(0, -2)
            if not len(x_TI):  # an expert that is called without tokens
                return
            on_input(layer, x_TI)
            if on_gradient is not None and output.requires_grad:
                output.register_hook(lambda g: on_gradient(layer, x_TI, g.flatten(0, -2)))

        return see

    hooks = [layer.module.register_forward_hook(tap(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


CLIP = 10.0
"""The clipped gamma counts no token for more than this many times the median token (of its window)."""


def sum_gradients(seen: Seen, shard: int, counted: Container[str], device: torch.device | None) -> Sums:
    """Over the tokens of a shard, of every layer; on a device, or where they lie.

    `plain/LAYER` and `clipped/LAYER` are the sums of g^2, (O,), fp32; `language/LAYER` is that of the mean |dL/dW| of
    each window; `n/LAYER` is how many tokens there were, of layers that are `counted`.
    """
    sums: Sums = {}
    for name, held in seen.pairs[shard].items():
        every = [pair.move(device) for pair in held] if device else held
        for mark in dict.fromkeys(pair.mark for pair in every):
            key, pairs = mark + name, [pair for pair in every if pair.mark == mark]
            plain = [sum_squares(pair.g_TO) / pair.scale**2 for pair in pairs]
            clipped = [sum_squares(clip_tokens(pair.g_TO, CLIP)) / pair.scale**2 for pair in pairs]
            sums[f"plain/{key}"] = sum(plain[1:], plain[0])
            sums[f"clipped/{key}"] = sum(clipped[1:], clipped[0])
            sums[f"language/{key}"] = torch.tensor(seen.language[shard].get(key, 0.0), dtype=torch.float64)
            if name in counted:
                add_count(sums, key, *(pair.g_TO for pair in pairs))
    return sums


def add_curve(
    layer: Layer, held: Mapping[int, Sequence[Pair]], parts: Iterable[Tensor], leaves: Mapping[int, Sums]
) -> None:
    """Add `curve/LAYER`, sum_t (g_t^T dW x_t)^2 at each level, (L,), fp64, to what is known of each shard.

    `held` are the layer's pairs by shard, and `parts` what each level adds to dW, (O, I).
    """
    pairs = {shard: [pair.move(layer.device) for pair in own] for shard, own in held.items()}
    whole = [pair for shard in pairs.values() for pair in shard]
    if not whole:  # a span without gradient windows, or an expert that these never reached
        return
    changes = (part_OI.to(layer.device) for part_OI in parts)
    with explain_layer(f"KL curve of layer {layer.name}"):
        changes_LP = squared_loss_changes([(pair.x_TI, pair.g_TO) for pair in whole], changes)
    changes_LP /= torch.tensor([pair.scale**2 for pair in whole], dtype=torch.float64).to(changes_LP.device)
    columns = changes_LP.split([len(shard) for shard in pairs.values()], 1)
    for shard, column_LP in zip(pairs, columns, strict=True):
        marks = [pair.mark for pair in pairs[shard]]
        for mark in dict.fromkeys(marks):
            own = [place for place, other in enumerate(marks) if other == mark]
            leaves[shard][f"curve/{mark}{layer.name}"] = (
                column_LP if len(own) == len(marks) else column_LP[:, own]
            ).sum(1)
            if layer.pool:
                add_count(leaves[shard], mark + layer.name, *(pairs[shard][place].x_TI for place in own))
