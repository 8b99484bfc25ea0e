"""Which whole blocks go, and the least-squares fit of the blocks before them; from real forwards of the dense model."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from billhook_kernels.channels import HalvedSums, InputMoments, expand_units, fit_kept
from tools.base.errors import UserError
from tools.base.progress import Progress, heed_stop
from tools.measure.losses import KeptStates, pass_blocks
from tools.models.blocks import Blocks, take_hidden
from tools.models.layers import find_layers
from tools.models.readout import TokenLosses, compute_hidden, measure_losses, sum_losses
from tools.models.streamed import find_stream
from tools.models.unfinished import States, hold_states
from tools.surgery.moments import finish_moments, search_windows, tapped
from tools.surgery.parts import KINDS, Fit, Part, find_parts


class Drop(NamedTuple):
    """One block that goes, beside those before it."""

    block: int
    tokens: int
    """Of text put through models without some block, to find it."""
    kl: float
    """Without it and all before it, nats per token; infinite where it is not a number."""
    costs: Mapping[int, float]
    """Of each block that is left: the KL without it as last measured, summed over tokens; infinite likewise."""


def choose_blocks(
    model: Any, count: int, windows_BT: Tensor, progress: Progress, *, lead: int = 0
) -> tuple[list[int], int]:
    """(blocks to drop, in the order in which they went; tokens of text put through models without some block).

    As `drop_blocks` has them.
    """
    steps = list(islice(drop_blocks(model, windows_BT, progress, lead=lead), count))
    return [drop.block for drop in steps], sum(drop.tokens for drop in steps)


def _measure(block: int, measure: Callable[[], float]) -> float:
    return measure()


@torch.no_grad()
def drop_blocks(
    model: Any,
    windows_BT: Tensor,
    progress: Progress,
    gone: Sequence[Drop] = (),
    *,
    lead: int = 0,
    remember: Callable[[int, Callable[[], float]], float] = _measure,
) -> Generator[Drop, None, None]:
    """One block after another behind those that are `gone` already, each time the one without which the KL is lowest.

    Measured against the dense model on the first SEARCH_TOKENS. A block that cost more when fewer were gone than the
    best one costs now is not measured again; what runs below a block is not run again to measure it. The first `lead`
    tokens of each window are no text, and count in no KL. `remember(block, measure)` is the KL without one more block,
    of whoever measured it before, or as `measure()` has it.
    """
    blocks = Blocks(model)
    windows_BT = search_windows(windows_BT, lead)
    dense = _compute_all_hidden(blocks, windows_BT)
    dropped = [drop.block for drop in gone]
    costs = dict(gone[-1].costs) if gone else dict.fromkeys(range(len(blocks)), 0.0)
    while len(costs) > 1:
        inputs = read_inputs(blocks, dropped, windows_BT)
        best, tokens = math.inf, 0
        for i, block in enumerate(sorted(costs, key=costs.__getitem__)):
            progress(f"search block {len(dropped) + 1} to drop", i, len(costs))
            if costs[block] > best:
                break
            tokens += windows_BT[:, lead:].numel()
            read = [boundary[block] for boundary in inputs]
            without = partial(measure_without, blocks, [*dropped, block], windows_BT, read, dense, lead=lead)
            costs[block] = remember(block, lambda: _sum_kl(without()))  # noqa: B023 - called at once
            best = min(best, costs[block])
        dropped.append(min(costs, key=costs.__getitem__))
        kl = costs.pop(dropped[-1]) / windows_BT[:, lead:].numel()
        progress(f"search block {len(dropped)} to drop", 1, 1)
        yield Drop(dropped[-1], tokens, kl, dict(costs))


@torch.no_grad()
def pass_on_without_weights(blocks: Blocks, ids_T: Tensor) -> bool:
    """Whether the first block passes on what it reads where all its linear layers give nothing, and the others compute
    the same without it.

    It does not where a norm stands behind the sum (OPT-350M, GPT-1), or has a bias: there a block of zeros is another
    model than one without it. Nor do the others where attention is scaled by a block's number, as GPT-2's may be.
    """
    if getattr(blocks.model.config, "scale_attn_by_inverse_layer_idx", False):
        return False
    states_N = blocks.embed(ids_T)
    with ExitStack() as undo:
        for layer in find_layers(blocks.model):
            if layer.block == 0:
                hook = layer.module.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
                undo.callback(hook.remove)
        return torch.equal(blocks.run(ids_T, 0, states_N), states_N) or blocks.leave_something


def _sum_kl(losses: Sequence[TokenLosses]) -> float:
    kl = sum(own.kl for own in losses)
    return kl if math.isfinite(kl) else math.inf


def _compute_all_hidden(blocks: Blocks, windows_BT: Tensor) -> list[Tensor]:
    """What the head reads of each window, (T, D)."""
    if find_stream(blocks.model):
        return [hidden_BTD[0] for hidden_BTD in pass_blocks(blocks, windows_BT).values()]
    return [compute_hidden(blocks.model, ids_T[None])[0] for ids_T in windows_BT]


@torch.no_grad()
def read_inputs(blocks: Blocks, dropped: Sequence[int], windows_BT: Tensor) -> list[dict[int, Tensor]]:
    """What each block reads of each window when the dropped ones are skipped, on CPU."""
    inputs: list[dict[int, Tensor]] = [{} for _ in windows_BT]
    with skipping(blocks, dropped):
        if find_stream(blocks.model):
            states = [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
            for block in range(len(blocks)):
                for own, x_BTD in zip(inputs, states, strict=True):
                    own[block] = x_BTD
                states = pass_block(blocks, windows_BT, block, states)
            return inputs
        for ids_T, own in zip(windows_BT, inputs, strict=True):
            with blocks.only(0, len(blocks), ids_T) as boundary:
                compute_hidden(blocks.model, ids_T[None])
            own.update({block: hidden_BTD.cpu() for block, hidden_BTD in boundary.items()})
    return inputs


@torch.no_grad()
def measure_without(
    blocks: Blocks,
    dropped: Sequence[int],
    windows_BT: Tensor,
    read: Sequence[Tensor],
    dense: Sequence[Tensor] | None = None,
    *,
    lead: int = 0,
) -> list[TokenLosses]:
    """Losses of each window without some blocks; the last of them has `read` (1, T, D) of it without the others.

    What runs below it is not run again. The reference is the dense model's hidden states, (T, D) of each window.
    """
    first, losses = dropped[-1], list[TokenLosses]()
    references: Sequence[Tensor | None] = dense or [None] * len(windows_BT)
    with skipping(blocks, dropped):
        if find_stream(blocks.model):
            for block in range(first, len(blocks)):
                read = pass_block(blocks, windows_BT, block, read)
            for ids_T, hidden_BTD, dense_TD in zip(windows_BT, read, references, strict=True):
                losses.append(sum_losses(blocks.model, ids_T, hidden_BTD[0].to(ids_T.device), dense_TD, lead=lead))
            return losses
        for ids_T, read_BTD, dense_TD in zip(windows_BT, read, references, strict=True):
            with blocks.only(first, len(blocks), ids_T, read_BTD):
                losses.append(measure_losses(blocks.model, ids_T, dense_TD, lead=lead)[0])
    return losses


@torch.no_grad()
def pass_block(blocks: Blocks, windows_BT: Tensor, block: int, states: Sequence[Tensor]) -> list[Tensor]:
    """What each window is behind a block, or behind the last one what the head reads, (1, T, D) on CPU.

    Who has all windows pass a block before any passes the next reads a streamed model once.
    """
    passed = []
    for ids_T, x_BTD in zip(windows_BT, states, strict=True):
        heed_stop()
        passed.append(blocks.run_to_head(ids_T, block, x_BTD).cpu())
    return passed


@torch.no_grad()
def fold_blocks(
    model: Any,
    dropped: Sequence[int],
    windows_BT: Tensor,
    progress: Progress,
    stays: Sequence[tuple[Part, Tensor]] = (),
    kept: KeptStates | None = None,
) -> Generator[Fit, None, None]:
    """The fits of parts of which some units stay, and of the MLP's output projection of each block just before dropped
    ones: to what the dense model passes on, of what reaches them behind the blocks that were cut below.

    Attention's output projection is fitted to give what it gave with all units, of what the cut model reads there. An
    MLP's, fitted behind that, makes up, too, for all that the dense model passes on otherwise: what went below and of
    the block's own heads, and dropped blocks behind it. Not where blocks have no such projection, or do not simply add
    its output to their own; nothing precedes a first block. A block whose fits have been given runs by them, whether or
    not they are in the model by then. What is `kept` is what both models pass on to the next block that has not been
    done, once whoever was given fits of those below comes for more.
    """
    blocks = Blocks(model)
    fitted = {(part.block, part.kind): (part, units) for part, units in stays if part.block not in dropped}
    # before blocks are run: whoever looks at the weights of one that is streamed has it read once more
    sizes = {own: (part.output.weight_OI.shape[1], part.output.device) for own, (part, _) in fitted.items()}
    mending = _find_mending(blocks, windows_BT[0])
    for first, end in _segments(len(blocks), dropped):
        if end > first + 1 and first not in dropped and first in mending:
            part = mending[first]
            fitted.setdefault((first, "neurons"), (part, torch.arange(part.units)))
            sizes.setdefault((first, "neurons"), (part.output.weight_OI.shape[1], part.output.device))
    begin, states, dense = _take_up(blocks, windows_BT, kept)
    for first, end in _segments(len(blocks), dropped):
        if first < begin:
            continue
        if kept:
            kept.keep(first, dict(enumerate([*states.values(), *dense.values()])))
        progress("fold and fit", first, len(blocks))
        pass_on(blocks, windows_BT, dense, range(first, end))
        fits = list[Fit]()
        for kind in KINDS:
            if (first, kind) not in fitted:
                continue
            (part, units), total = fitted[first, kind], HalvedSums(*sizes[first, kind])
            with running_by(fits):
                _sum_up(blocks, first, part, total, windows_BT, states, dense, mends=first in mending)
            fits.append(_fit(part, units, finish_moments(total, part)))
        if first not in dropped:
            with running_by(fits):
                pass_on(blocks, windows_BT, states, range(first, first + 1))
        yield from fits
    progress("fold and fit", len(blocks), len(blocks))


def _take_up(blocks: Blocks, windows_BT: Tensor, kept: KeptStates | None) -> tuple[int, States, States]:
    """(the block to begin with, what it reads of each window in the cut model, and in the dense one), on CPU."""
    count, (first, given) = len(windows_BT), (kept.read() if kept else None) or (0, {})

    def begin(place: int) -> Tensor:
        return given[place] if given else blocks.embed(windows_BT[place % count])

    states = hold_states(blocks.model, range(count), begin)
    return first, states, hold_states(blocks.model, range(count), lambda window: begin(count + window))


def _sum_up(
    blocks: Blocks,
    block: int,
    part: Part,
    total: HalvedSums,
    windows_BT: Tensor,
    states: Mapping[int, Tensor],
    dense: Mapping[int, Tensor],
    *,
    mends: bool,
) -> None:
    """Add what the output projection of a block's part reads in the cut model, and what that of its neurons, where it
    `mends`, has to give beside its own output."""
    for ids_T, x_BTD, dense_BTD in zip(windows_BT, states.values(), dense.values(), strict=True):
        heed_stop()
        read = list[Tensor]()
        with tapped([part], [read.append]):
            own_BTD = blocks.run(ids_T, block, x_BTD.to(ids_T.device))
        lacking_TD = (dense_BTD.to(own_BTD.device).float() - own_BTD.float())[0] if mends else None
        total.add(read[0], lacking_TD if part.kind == "neurons" else None)


def pass_on(blocks: Blocks, windows_BT: Tensor, states: States, passed: range) -> None:
    """Take each window on behind some blocks, in place; all pass one before the next, read once if it is streamed."""
    for block in passed:
        for i, ids_T in enumerate(windows_BT):
            heed_stop()
            states[i] = blocks.run(ids_T, block, states[i].to(ids_T.device)).cpu()


@contextmanager
def running_by(fits: Sequence[Fit]) -> Iterator[None]:
    """Inside, the output projections of some parts compute what they do by their fits, of the units that stay."""

    def compute(fit: Fit) -> Callable[..., Tensor]:
        weight_OI = fit.part.output.weight_OI
        kept_K = expand_units(fit.units.to(weight_OI.device), weight_OI.shape[1] // fit.part.units)
        weight_OK = weight_OI[:, kept_K] if fit.weight_OK is None else fit.weight_OK
        bias_O = fit.part.bias if fit.bias_O is None else fit.bias_O

        def run(_module: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            x = inputs[0]
            return linear(x[..., kept_K.to(x.device)], weight_OK.to(x), None if bias_O is None else bias_O.to(x))

        return run

    with ExitStack() as undo:
        for fit in fits:
            undo.callback(fit.part.output.module.register_forward_hook(compute(fit)).remove)
        yield


def _fit(part: Part, units: Tensor, moments: InputMoments) -> Fit:
    device, weight_OI, bias_O = part.output.device, part.output.weight_OI, part.bias
    kept_K = expand_units(units.to(device), weight_OI.shape[1] // part.units)
    bias_O = None if bias_O is None else bias_O.to(device)
    return Fit(part, units, *fit_kept(weight_OI.to(device), bias_O, moments, kept_K))


def _find_mending(blocks: Blocks, ids_T: Tensor) -> dict[int, Part]:
    """The neurons of each block, by its number, whose output projection can make up for what others do not pass on."""
    try:
        parts = find_parts(blocks.model, "neurons")
    except UserError:
        return {}
    return {part.block: part for part in parts} if _adds_output(blocks, parts[0], ids_T) else {}


def _segments(count: int, dropped: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of each block that stays with the dropped ones after it, and of dropped ones before all others."""
    starts = [block for block in range(count) if block == 0 or block not in dropped]
    return pairwise([*starts, count])


def _adds_output(blocks: Blocks, part: Part, ids_T: Tensor) -> bool:
    """Whether a block gives its MLP's output projection's output plus something else: not so if a norm comes after."""
    outputs: list[Tensor] = []
    embedded_BTD = blocks.embed(ids_T)
    hook = part.output.module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    once_BTD = blocks.run(ids_T, part.block, embedded_BTD)
    hook.remove()
    hook = part.output.module.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    twice_BTD = blocks.run(ids_T, part.block, embedded_BTD)
    hook.remove()
    added_BTD = outputs[0].view_as(once_BTD)
    return bool((twice_BTD - once_BTD - added_BTD).float().norm() < 0.5 * added_BTD.float().norm())


@contextmanager
def skipping(blocks: Blocks, dropped: Sequence[int]) -> Iterator[None]:
    """Inside, the dropped blocks run, but pass their input on."""

    def pass_on(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden_BTD = take_hidden(args, kwargs)
        return hidden_BTD if isinstance(output, Tensor) else (hidden_BTD, *output[1:])

    with ExitStack() as undo:
        for block in dropped:
            undo.callback(blocks.modules[block].register_forward_hook(pass_on, with_kwargs=True).remove)
        yield
