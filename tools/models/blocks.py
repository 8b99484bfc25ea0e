"""Run some of a model's decoder blocks: the others pass their input on.

A block is never called by hand. The model itself runs and gives its blocks whatever they need (masks, rotary
embeddings, per-layer inputs), from the very tokens; what is left out costs nothing.

Shape suffixes: B windows, T tokens, D hidden width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tools.models.layers import find_blocks
from tools.models.readout import compute_hidden

_PROBE = 4
"""Tokens of the forward that shows what a block returns."""


class Blocks:
    """The decoder blocks of a loaded model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = list(find_blocks(model))
        self._lengths: list[int | None] | None = None

    def __len__(self) -> int:
        return len(self.modules)

    def embed(self, ids_T: Tensor) -> Tensor:
        """What the first block reads, (1, T, D)."""
        with torch.no_grad(), self.only(0, 0, ids_T) as boundary:
            compute_hidden(self.model, ids_T[None])
        return boundary[0]

    def run(self, ids_T: Tensor, block: int, hidden_BTD: Tensor) -> Tensor:
        """What one block makes of its input, on its own device: (1, T, D), with a graph where gradients are on."""
        with self.only(block, block + 1, ids_T, hidden_BTD) as boundary:
            compute_hidden(self.model, ids_T[None])
        return boundary[block + 1]

    @contextmanager
    def only(
        self, first: int, end: int, ids_T: Tensor, hidden_BTD: Tensor | None = None
    ) -> Iterator[dict[int, Tensor]]:
        """Inside, a forward of the model on `ids_T` runs blocks `first` to `end` - 1 only.

        `hidden_BTD`, on any device, is what the first of them reads; without it, what the embeddings give. Filled by
        the forward: what was passed on at each boundary from `first` to `end`, the input of block b under b.
        """
        if hidden_BTD is not None:
            hidden_BTD = hidden_BTD.to(next(self.modules[first].parameters()).device)
        lengths = self._look(ids_T)
        boundary: dict[int, Tensor] = {}
        with ExitStack() as undo:
            for index, block in enumerate(self.modules):
                runs = first <= index < end
                if not runs:
                    undo.enter_context(_passing_on(block, lengths[index]))
                if runs or index == first:
                    enter = _enter(boundary, index, hidden_BTD if index == first else None)
                    undo.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                if index == end - 1:
                    undo.callback(block.register_forward_hook(_leave(boundary, end)).remove)
            yield boundary

    def _look(self, ids_T: Tensor) -> list[int | None]:
        """For each block: the length of the tuple that it returns, None when it returns a tensor."""
        if self._lengths is None:
            lengths: list[int | None] = []

            def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
                lengths.append(len(output) if isinstance(output, tuple) else None)

            hooks = [block.register_forward_hook(see) for block in self.modules]
            try:
                with torch.no_grad():
                    compute_hidden(self.model, ids_T[None, :_PROBE])
            finally:
                for hook in hooks:
                    hook.remove()
            self._lengths = lengths
        return self._lengths


def _enter(boundary: dict[int, Tensor], index: int, given_BTD: Tensor | None) -> Callable[..., Any]:
    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_BTD = given_BTD if given_BTD is not None else _first(args, kwargs)
        boundary[index] = hidden_BTD
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTD})

    return enter


def _leave(boundary: dict[int, Tensor], index: int) -> Callable[..., None]:
    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        boundary[index] = output[0] if isinstance(output, tuple) else output

    return leave


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _passing_on(block: nn.Module, length: int | None) -> Iterator[None]:
    """Replace what a block does by handing its input on, in the form in which it returns its output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_BTD = _first(args, kwargs)
        return hidden_BTD if length is None else (hidden_BTD, *[None] * (length - 1))

    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before
