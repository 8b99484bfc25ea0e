"""Hooks on layers, which show what they read and what flows back through them.

Shape suffixes: T tokens, I input features (d_in), O output features (d_out).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tools.models.layers import Layer


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
