"""Which whole blocks go, and the least-squares fit of the blocks before them; from real forwards of the dense model."""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.channels import HalvedSums, expand_units, fit_kept
from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.models.blocks import Blocks, take_hidden
from tools.models.readout import TokenLosses, compute_hidden, measure_losses
from tools.surgery.moments import finish_moments, search_windows, tapped
from tools.surgery.parts import Fit, Part, find_parts


class Drop(NamedTuple):
    """One block that goes, beside those before it."""

    block: int
    tokens: int
    """Of text put through models without some block, to find it."""
    kl: float
    """Without it and all before it, nats per token; infinite where it is not a number."""


def choose_blocks(
    model: Any, count: int, windows_BT: Tensor, progress: Progress, *, lead: int = 0
) -> tuple[list[int], int]:
    """(blocks to drop, in the order in which they went; tokens of text put through models without some block).

    As `drop_blocks` has them.
    """
    steps = list(islice(drop_blocks(model, windows_BT, progress, lead=lead), count))
    return [drop.block for drop in steps], sum(drop.tokens for drop in steps)


@torch.no_grad()
def drop_blocks(model: Any, windows_BT: Tensor, progress: Progress, *, lead: int = 0) -> Generator[Drop, None, None]:
    """One block after another, each time the one without which the KL is lowest.

    Measured against the dense model on the first SEARCH_TOKENS. A block that cost more when fewer were gone than the
    best one costs now is not measured again; what runs below a block is not run again to measure it. The first `lead`
    tokens of each window are no text, and count in no KL.
    """
    blocks = Blocks(model)
    windows_BT = search_windows(windows_BT, lead)
    dense = [compute_hidden(model, ids_T[None])[0] for ids_T in windows_BT]
    dropped: list[int] = []
    costs = dict.fromkeys(range(len(blocks)), 0.0)
    while len(costs) > 1:
        inputs = [read_inputs(blocks, dropped, ids_T) for ids_T in windows_BT]
        best, tokens = math.inf, 0
        for i, block in enumerate(sorted(costs, key=costs.__getitem__)):
            progress(f"search block {len(dropped) + 1} to drop", i, len(costs))
            if costs[block] > best:
                break
            tokens += windows_BT[:, lead:].numel()
            kl = 0.0
            for ids_T, dense_TD, boundary in zip(windows_BT, dense, inputs, strict=True):
                kl += measure_without(blocks, [*dropped, block], ids_T, boundary[block], dense_TD, lead=lead).kl
            costs[block] = kl if math.isfinite(kl) else math.inf
            best = min(best, costs[block])
        dropped.append(min(costs, key=costs.__getitem__))
        kl = costs.pop(dropped[-1]) / windows_BT[:, lead:].numel()
        progress(f"search block {len(dropped)} to drop", 1, 1)
        yield Drop(dropped[-1], tokens, kl)


def read_inputs(blocks: Blocks, dropped: Sequence[int], ids_T: Tensor) -> dict[int, Tensor]:
    """What each block reads when the dropped ones are skipped, on CPU."""
    with skipping(blocks, dropped), blocks.only(0, len(blocks), ids_T) as boundary:
        compute_hidden(blocks.model, ids_T[None])
    return {block: hidden_BTD.cpu() for block, hidden_BTD in boundary.items()}


def measure_without(
    blocks: Blocks,
    dropped: Sequence[int],
    ids_T: Tensor,
    read_BTD: Tensor,
    dense_TD: Tensor | None = None,
    *,
    lead: int = 0,
) -> TokenLosses:
    """Losses of a window without some blocks; the last of them reads `read_BTD` without the others.

    What runs below it is not run again. The reference is the dense model's hidden states.
    """
    with skipping(blocks, dropped), blocks.only(dropped[-1], len(blocks), ids_T, read_BTD):
        return measure_losses(blocks.model, ids_T, dense_TD, lead=lead)[0]


@torch.no_grad()
def fold_blocks(
    model: Any,
    dropped: Sequence[int],
    windows_BT: Tensor,
    progress: Progress,
    stays: Sequence[tuple[Part, Tensor]] = (),
) -> list[Fit]:
    """What makes up for dropped blocks: the MLP's output projection of each block that stays just before some.

    It is fitted to give, beside its own output, what the dropped blocks added in the dense model. Not where the blocks
    have no such projection, or do not simply add its output to their own. Nothing precedes a first block. Parts of
    which only some units stay, given with these, are fitted on the same walk.
    """
    blocks = Blocks(model)
    folded = _find_folded(blocks, dropped, windows_BT[0])
    kept = {(part.block, part.kind): (part, units) for part, units in stays if part.block not in dropped}
    for part in folded.values():
        every_U = torch.arange(part.units, device=windows_BT.device)
        kept.setdefault((part.block, part.kind), (part, every_U))
    fits, states = [], [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
    for first, end in _segments(len(blocks), dropped):
        progress("fold and fit", first, len(blocks))
        members = [own for (block, _), own in kept.items() if block == first]
        sums = [HalvedSums(part.output.weight_OI.shape[1], windows_BT.device) for part, _ in members]
        for i, ids_T in enumerate(windows_BT):
            read: list[list[Tensor]] = [[] for _ in members]
            with tapped([part for part, _ in members], [own.append for own in read]):
                own_BTD = hidden_BTD = blocks.run(ids_T, first, states[i].to(ids_T.device))
            for block in range(first + 1, end):
                hidden_BTD = blocks.run(ids_T, block, hidden_BTD)
            states[i] = hidden_BTD.cpu()
            for (part, _), total, [x_TI] in zip(members, sums, read, strict=True):
                total.add(x_TI, (hidden_BTD.float() - own_BTD.float())[0] if part is folded.get(first) else None)
        for (part, units), total in zip(members, sums, strict=True):
            kept_K = expand_units(units, part.output.weight_OI.shape[1] // part.units)
            fits.append(
                Fit(part, units, *fit_kept(part.output.weight_OI, part.bias, finish_moments(total, part), kept_K))
            )
    progress("fold and fit", len(blocks), len(blocks))
    return fits


def _find_folded(blocks: Blocks, dropped: Sequence[int], ids_T: Tensor) -> dict[int, Part]:
    """The neurons of each block that stays just before dropped ones, whose output projection can make up for them."""
    try:
        parts = find_parts(blocks.model, "neurons")
    except UserError:
        return {}
    first = [start for start, end in _segments(len(blocks), dropped) if end > start + 1 and start not in dropped]
    return {block: parts[block] for block in first} if first and _adds_output(blocks, parts[0], ids_T) else {}


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
