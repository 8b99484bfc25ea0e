"""Which whole blocks go, and the least-squares fit of the blocks before them; from real forwards of the dense model."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.channels import MomentSums, fit_kept
from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.models.blocks import Blocks
from tools.models.readout import TokenLosses, compute_hidden, measure_losses
from tools.surgery.moments import finish_moments, search_windows, tapped
from tools.surgery.parts import Fit, Part, find_parts


@torch.no_grad()
def choose_blocks(
    model: Any, count: int, windows_BT: Tensor, progress: Progress, *, lead: int = 0
) -> tuple[list[int], int]:
    """(blocks to drop, in the order in which they went; tokens of text put through models without some block).

    Each time the one goes without which the KL is lowest.

    Measured against the dense model on the first SEARCH_TOKENS. A block that cost more when fewer were gone than the
    best one costs now is not measured again; what runs below a block is not run again to measure it. The first `lead`
    tokens of each window are no text, and count in no KL.
    """
    blocks = Blocks(model)
    windows_BT = search_windows(windows_BT, lead)
    dense = [compute_hidden(model, ids_T[None])[0] for ids_T in windows_BT]
    dropped: list[int] = []
    costs = dict.fromkeys(range(len(blocks)), 0.0)
    tokens = 0
    for done in range(count):
        inputs = [read_inputs(blocks, dropped, ids_T) for ids_T in windows_BT]
        best = math.inf
        for i, block in enumerate(sorted(costs, key=costs.__getitem__)):
            progress("search blocks", done * len(blocks) + i, count * len(blocks))
            if costs[block] > best:
                break
            tokens += windows_BT[:, lead:].numel()
            kl = 0.0
            for ids_T, dense_TD, boundary in zip(windows_BT, dense, inputs, strict=True):
                kl += measure_without(blocks, [*dropped, block], ids_T, boundary[block], dense_TD, lead=lead).kl
            costs[block] = kl if math.isfinite(kl) else math.inf
            best = min(best, costs[block])
        dropped.append(min(costs, key=costs.__getitem__))
        del costs[dropped[-1]]
    progress("search blocks", 1, 1)
    return dropped, tokens


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
def fold_blocks(model: Any, dropped: Sequence[int], windows_BT: Tensor, progress: Progress) -> list[Fit]:
    """What makes up for dropped blocks: the MLP's output projection of each block that stays just before some.

    It is fitted to give, beside its own output, what the dropped blocks added in the dense model. Empty where the
    blocks have no such projection, or do not simply add its output to their own. Nothing precedes a first block.
    """
    blocks = Blocks(model)
    try:
        parts = find_parts(model, "neurons")
    except UserError:
        return []
    if not _adds_output(blocks, parts[0], windows_BT[0]):
        return []
    fits, states = [], [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
    for first, end in _segments(len(blocks), dropped):
        progress("fold blocks", first, len(blocks))
        sums = MomentSums(parts[0].output.weight_OI.shape[1], windows_BT.device)
        for i, ids_T in enumerate(windows_BT):
            read: list[Tensor] = []
            with tapped(parts[first : first + 1], [read.append]):
                own_BTD = hidden_BTD = blocks.run(ids_T, first, states[i].to(ids_T.device))
            for block in range(first + 1, end):
                hidden_BTD = blocks.run(ids_T, block, hidden_BTD)
            states[i] = hidden_BTD.cpu()
            if end > first + 1 and first not in dropped:
                sums.add(read[0], (hidden_BTD.float() - own_BTD.float())[0])
        if sums.tokens:
            part = parts[first]
            every_U = torch.arange(part.units, device=windows_BT.device)
            fitted = fit_kept(part.output.weight_OI, part.bias, finish_moments(sums, part), every_U)
            fits.append(Fit(part, every_U, *fitted))
    progress("fold blocks", len(blocks), len(blocks))
    return fits


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
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        return hidden_BTD if isinstance(output, Tensor) else (hidden_BTD, *output[1:])

    with ExitStack() as undo:
        for block in dropped:
            undo.callback(blocks.modules[block].register_forward_hook(pass_on, with_kwargs=True).remove)
        yield
