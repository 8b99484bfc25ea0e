"""Whole blocks that go as others publish it: ShortGPT and SLEB. Neither changes what stays.

Shape suffixes: B windows, T tokens, D hidden width.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.models.blocks import Blocks
from tools.surgery.blocks import measure_without, read_inputs


@torch.no_grad()
def rank_blocks(model: Any, windows_BT: Tensor, progress: Progress, *, lead: int = 0) -> list[float]:
    """ShortGPT's block influence (arXiv 2403.03853, equation 1) of every block: 1 - E[cos(x, y)].

    x is what the block reads, y what it gives, of each token of the text in the dense model; those of least influence
    go, all at once. The first `lead` tokens of each window are no text.
    """
    blocks = Blocks(model)
    influences = []
    states = [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
    for block in range(len(blocks)):
        progress("block influence", block, len(blocks))
        total = 0.0
        for i, ids_T in enumerate(windows_BT):
            x_BTD = states[i].to(ids_T.device)
            y_BTD = blocks.run(ids_T, block, x_BTD)
            alike_BT = torch.nn.functional.cosine_similarity(x_BTD.double(), y_BTD.double(), dim=-1)
            total += float((1 - alike_BT[:, lead:]).mean())
            states[i] = y_BTD.cpu()
        influences.append(total / len(windows_BT))
    progress("block influence", len(blocks), len(blocks))
    return influences


def drop_least(influences: list[float], count: int) -> list[int]:
    """The blocks of least influence, the least first; ties from below."""
    return sorted(range(len(influences)), key=influences.__getitem__)[:count]


@torch.no_grad()
def eliminate_blocks(
    model: Any, count: int, windows_BT: Tensor, progress: Progress, gone: Sequence[int] = (), *, lead: int = 0
) -> Iterator[int]:
    """SLEB (arXiv 2402.09025, algorithm 1; github.com/jiwonsong-dev/SLEB): one block after another goes, behind those
    that are `gone` already, until so many are.

    Each time it is the one without which the model that is left has the lowest loss on the whole calibration text; the
    first and the last block that are left are not tried, as in the authors' code. Raises UserError where so many cannot
    go.
    """
    blocks = Blocks(model)
    if count > len(blocks) - 2:
        raise UserError(f"SLEB keeps the first and the last block: of {len(blocks)} it takes no {count}")
    dropped = list(gone)
    alive = [block for block in range(len(blocks)) if block not in dropped]
    for done in range(len(dropped), count):
        inputs = read_inputs(blocks, dropped, windows_BT)
        losses = {}
        for i, block in enumerate(alive[1:-1]):
            progress("search blocks", done * len(blocks) + i, count * len(blocks))
            read = [boundary[block] for boundary in inputs]
            nll = sum(x.nll for x in measure_without(blocks, [*dropped, block], windows_BT, read, lead=lead))
            losses[block] = nll if math.isfinite(nll) else math.inf
        dropped.append(min(losses, key=losses.__getitem__))
        alive.remove(dropped[-1])
        yield dropped[-1]
    progress("search blocks", 1, 1)


def count_eliminated(blocks: int, count: int, windows_BT: Tensor, lead: int = 0) -> int:
    """Tokens of text that `eliminate_blocks` puts through models without some block."""
    return sum(blocks - done - 2 for done in range(count)) * windows_BT[:, lead:].numel()
