"""Run some of a model's decoder blocks: the others pass their input on.

A block is never called by hand. The model itself runs and gives its blocks whatever they need (masks, rotary
embeddings, per-layer inputs), from the very tokens; what is left out costs nothing.

What is passed on from block to block is one tensor: the hidden states, (1, T, D), or whatever shape an architecture
gives them. Where blocks also leave something for later ones in a mapping that all of them are given (keys and values,
in Gemma 3n), its tensors are laid behind the hidden states in one row of numbers, so that gradients flow through them.

Shape suffixes: B windows, T tokens, D hidden width, N numbers.
"""

import functools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tools.base.errors import UserError, in_one_line
from tools.models.layers import find_blocks, find_device
from tools.models.positions import CHECKED
from tools.models.readout import compute_hidden
from tools.models.streamed import find_stream

_PROBE = 4
"""Tokens of the forward that shows what a block returns."""

_TOLERANCE = 0.02
"""How far the two may lie apart at a token, as a share of the length of what stands there: room for sums that a GPU
adds in any order. On CPUs they are the same bits, or nearly."""


class _Form(NamedTuple):
    """A tensor that lies in a row of numbers."""

    shape: torch.Size
    dtype: torch.dtype
    key: Any
    """Of the mapping in which it was left; tensors in a row under one key are a tuple. None of the hidden states."""


_LOOK = "_billhook_look"
"""Under this name a model has what was seen of its blocks: a look is a forward, and reads all of a streamed one."""


class Look(NamedTuple):
    """What a forward shows of the blocks of a model, whatever its weights."""

    lengths: list[int | None]
    """For each block: the length of the tuple or list that it returns, None when it returns a tensor."""
    left: str
    """The name of the mapping in which blocks leave something for later ones; empty where they leave nothing."""


class Blocks:
    """The decoder blocks of a loaded model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = list(find_blocks(model))
        self._forms: dict[tuple[int, int], list[_Form]] = {}

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def leave_something(self) -> bool:
        """Whether blocks leave something for later ones beside what they pass on; known once one has run.

        Who packed that into a row alone knows what is what, so that no other process can go on from there.
        """
        return bool(self._left)

    @property
    def _left(self) -> str:
        seen: Look | None = getattr(self.model, _LOOK, None)
        return seen.left if seen else ""

    def embed(self, ids_T: Tensor) -> Tensor:
        """What the first block reads, (1, T, D)."""
        with torch.no_grad(), self.only(0, 0, ids_T) as boundary:
            compute_hidden(self.model, ids_T[None])
        return boundary[0]

    def run(self, ids_T: Tensor, block: int, hidden_BTD: Tensor) -> Tensor:
        """What one block makes of its input, on its own device, with a graph where gradients are on.

        Both are what is passed on between blocks: (1, T, D), or a row of numbers with what was left for later blocks.
        """
        with self.only(block, block + 1, ids_T, hidden_BTD) as boundary:
            compute_hidden(self.model, ids_T[None])
        return boundary[block + 1]

    def run_to_head(self, ids_T: Tensor, block: int, hidden_BTD: Tensor) -> Tensor:
        """As `run`; of the last block, what the head reads behind it."""
        if block < len(self) - 1:
            return self.run(ids_T, block, hidden_BTD)
        with self.only(block, block + 1, ids_T, hidden_BTD):
            return compute_hidden(self.model, ids_T[None])

    @contextmanager
    def only(
        self, first: int, end: int, ids_T: Tensor, hidden_BTD: Tensor | None = None
    ) -> Iterator[dict[int, Tensor]]:
        """Inside, a forward of the model on `ids_T` runs blocks `first` to `end` - 1 only.

        `hidden_BTD`, on any device, is what the first of them reads; without it, what the embeddings give. Filled by
        the forward: what was passed on at each boundary from `first` to `end`, the input of block b under b. Raises
        UserError when the model does not run its blocks one after another.
        """
        if hidden_BTD is not None:
            hidden_BTD = hidden_BTD.to(find_device(self.modules[first]))
        lengths = self.look(ids_T).lengths
        boundary: dict[int, Tensor] = {}
        with ExitStack() as undo:
            for index, block in enumerate(self.modules):
                runs = first <= index < end
                if not runs:
                    undo.enter_context(_passing_on(block, lengths[index]))
                if runs or index == first:
                    enter = self._enter(boundary, index, hidden_BTD if index == first else None)
                    undo.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                if index == end - 1:
                    leave = self._leave(boundary, end)
                    undo.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
            yield boundary

    def _enter(self, boundary: dict[int, Tensor], index: int, given: Tensor | None) -> Callable[..., Any]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden_BTD = take_hidden(args, kwargs)
            if given is not None:
                hidden_BTD = self._unpack(index, given, kwargs)
            boundary[index] = self._pack(index, hidden_BTD, kwargs) if given is None else given
            return give_hidden(hidden_BTD, args, kwargs)

        return enter

    def _leave(self, boundary: dict[int, Tensor], index: int) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            boundary[index] = self._pack(index, output if isinstance(output, Tensor) else output[0], kwargs)

        return leave

    def _pack(self, index: int, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What is passed on to block `index`: the hidden states, and what was left by the blocks that ran."""
        left = kwargs.get(self._left)
        if not left:
            return hidden_BTD
        tensors: list[tuple[Any, Tensor]] = [(None, hidden_BTD)]
        tensors += [(key, tensor) for key, value in left.items() for tensor in value]
        forms = [_Form(tensor.shape, tensor.dtype, key) for key, tensor in tensors]
        packed_N = torch.cat([tensor.to(hidden_BTD.device).flatten() for _, tensor in tensors])
        self._forms[index, len(packed_N)] = forms
        return packed_N

    def _unpack(self, index: int, packed_N: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states that `_pack` packed; what was left is put back into the mapping."""
        if packed_N.ndim > 1:
            return packed_N
        forms = self._forms[index, len(packed_N)]
        left, sizes = kwargs[self._left], [form.shape.numel() for form in forms]
        parts: list[Tensor] = [
            part.view(form.shape).to(form.dtype) for part, form in zip(packed_N.split(sizes), forms, strict=True)
        ]
        for form, part in zip(forms[1:], parts[1:], strict=True):
            left[form.key] = (*left.get(form.key, ()), part)
        return parts[0]

    def look(self, ids_T: Tensor) -> Look:
        """What the first look at the model shows, a forward of a few of these tokens.

        Whoever taps its layers has looked before, or been told: a forward more would be counted. Raises UserError when
        the model does not run each of its blocks once, in their order.
        """
        if not hasattr(self.model, _LOOK):
            setattr(self.model, _LOOK, self._see(ids_T))
        seen: Look = getattr(self.model, _LOOK)
        return seen

    def recall(self, seen: Look) -> None:
        """Take what `look` showed of this model in another process."""
        setattr(self.model, _LOOK, seen)

    def _see(self, ids_T: Tensor) -> Look:
        ran: list[nn.Module] = []
        lengths: list[int | None] = []
        mappings: list[tuple[str, Any, int]] = []

        def see_first(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            mappings.extend((n, value, len(value)) for n, value in kwargs.items() if isinstance(value, MutableMapping))

        def see(module: nn.Module, _args: Any, output: Any) -> None:
            ran.append(module)
            lengths.append(None if isinstance(output, Tensor) else len(output))

        hooks = [block.register_forward_hook(see) for block in dict.fromkeys(self.modules)]
        hooks.append(self.modules[0].register_forward_pre_hook(see_first, with_kwargs=True))
        try:
            with torch.no_grad():
                compute_hidden(self.model, ids_T[None, :_PROBE])
        finally:
            for hook in hooks:
                hook.remove()
        if ran != self.modules:
            raise _refuse(self.model, "they do not run once each, in their order")
        return Look(lengths, next((name for name, value, before in mappings if len(value) > before), ""))


def check_blocks(blocks: Blocks, ids_T: Tensor) -> None:
    """Compare the blocks run one by one, forward and backward, with the model whole, on 16 tokens.

    What the head reads, and a gradient of it at the first block, must be the same either way, to `_TOLERANCE`. Raises
    UserError, in one line, for an architecture of which that is not true.
    """
    model, ids_T = blocks.model, ids_T[:CHECKED]
    try:
        ours, theirs = _run_chain(blocks, ids_T), run_whole(blocks, ids_T)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every architecture breaks in a way of its own
        raise _refuse(model, f"{type(error).__name__}: {in_one_line(error)}") from error
    if not _agree(ours[0], theirs[0]):
        raise _refuse(model, "what comes out is not what the model makes of the same tokens")
    if not _agree(ours[1], theirs[1]):
        raise _refuse(model, "what flows back through them is not what flows back through the model")


def _run_chain(blocks: Blocks, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """(what the head reads, a gradient of it at the first block), block after block."""
    states, last = [blocks.embed(ids_T)], len(blocks) - 1
    with torch.no_grad():
        for block in range(last):
            states.append(blocks.run(ids_T, block, states[-1]))
    with torch.enable_grad():
        given = states[last].detach().requires_grad_()
        hidden_BTD = blocks.run_to_head(ids_T, last, given)
        [above] = torch.autograd.grad(hidden_BTD, given, _draw_like(hidden_BTD))
        for block in reversed(range(last)):
            given = states[block].detach().requires_grad_()
            output = blocks.run(ids_T, block, given)
            [above] = torch.autograd.grad(output, given, above.to(output.device))
    return hidden_BTD.detach(), above


@torch.enable_grad()
def run_whole(blocks: Blocks, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """As `_run_chain`, by one forward and one backward of the model.

    Where blocks are streamed each runs forward once more on the way back: a graph would hold the weights of all. Not
    where they leave something for later ones, which they would leave twice.
    """
    start, model = blocks.embed(ids_T).detach().requires_grad_(), blocks.model
    again = blocks.modules if find_stream(model) and not blocks.leave_something else []
    with _run_again(again), blocks.only(0, len(blocks), ids_T, start):
        hidden_BTD = compute_hidden(model, ids_T[None])
        [gradient] = torch.autograd.grad(hidden_BTD, start, _draw_like(hidden_BTD))
    return hidden_BTD.detach(), gradient


@contextmanager
def _run_again(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, modules hold nothing of a forward but what they were given, and run once more on the way back."""
    before = [module.forward for module in modules]
    for module, forward in zip(modules, before, strict=True):
        module.forward = functools.partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            module.forward = forward


def _draw_like(hidden_BTD: Tensor) -> Tensor:
    """A gradient to begin with: not one that a norm would take to zero."""
    drawn = torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(hidden_BTD.device, hidden_BTD.dtype)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are the same to `_TOLERANCE`, as vectors along the last dimension."""
    theirs = theirs.float()
    distance = (ours.to(theirs.device).float() - theirs).norm(dim=-1)
    return bool((distance <= _TOLERANCE * theirs.norm(dim=-1)).all())


def _refuse(model: Any, reason: str) -> UserError:
    return UserError(
        f"the blocks of {type(model).__name__} cannot be run one by one ({reason}); it is not supported yet"
    )


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states among what a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def give_hidden(hidden_BTD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a block is called with, with other hidden states, as a hook before it answers."""
    return ((hidden_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTD})


@contextmanager
def _passing_on(block: nn.Module, length: int | None) -> Iterator[None]:
    """Replace what a block does by handing its input on, in the form in which it returns its output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_BTD = take_hidden(args, kwargs)
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
