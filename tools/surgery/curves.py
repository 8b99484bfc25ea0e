"""What it costs to take units away: the KL predicted for every number of neurons, or of groups of heads, of a block.

One walk up through the blocks, one down: gradients of -log p of tokens that the model draws itself, at what the output
projections give, make the Fisher information of their outputs; what they read makes A. No unit is taken away to measure
it. The moments of one block are held at a time; what the blocks below read waits on disk.

Shape suffixes: B windows, T tokens, D hidden width, I input channels, O output features.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.channels import Elimination, MomentSums, eliminate_units
from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.models.blocks import Blocks
from tools.models.readout import hidden_gradients
from tools.plans.cuts import Counts
from tools.statistics.states import StateStack
from tools.surgery.blocks import pass_block
from tools.surgery.moments import finish_moments, kept_outputs, tapped
from tools.surgery.parts import KINDS, Kind, Part, find_parts

TOGETHER = 96
"""Of the neurons of a block, so many parts of them go at a time: a hundredth of thousands."""

Curves = dict[Kind, list[Elimination]]
"""Of every kind, by block: its units in the order in which they go, and the predicted KL of all up to each."""


def measure_curves(
    model: Any,
    most: Counts,
    windows_BT: Tensor,
    progress: Progress,
    *,
    lead: int = 0,
    seed: int = 0,
    scratch: Path | None = None,
) -> Curves:
    """The curves of as many units as `most` has of each kind, in nats per token, where the rest is fitted.

    The first `lead` tokens of each window are no text. In the directory `scratch`, or where this system has its files
    for a while, lies what blocks read, in a file without a name. Raises UserError where moments or gradients are not
    finite, or such parts cannot be cut, and DiskFull.
    """
    blocks = Blocks(model)
    parts = {kind: find_parts(model, kind) for kind in KINDS if getattr(most, kind)}
    states = _walk_up(blocks, windows_BT, progress, StateStack(scratch or Path(tempfile.gettempdir())))
    above = begin_gradients(blocks, windows_BT, states.pop(), lead, seed)
    curves: Curves = {kind: [] for kind in parts}
    for block in reversed(range(len(blocks))):
        progress("curves of units", 2 * len(blocks) - 1 - block, 2 * len(blocks))
        members = [of_kind[block] for of_kind in parts.values()]
        sums = sum_moments(blocks, block, members, windows_BT, states.pop(), above, lead=lead)
        for part, curve in zip(members, _eliminate_all(members, most, sums), strict=True):
            curves[part.kind].insert(0, curve)
        del sums  # before those of the next block are made
    progress("curves of units", 1, 1)
    return curves


def sum_moments(
    blocks: Blocks,
    block: int,
    members: Sequence[Part],
    windows_BT: Tensor,
    states: Sequence[Tensor],
    above: list[Tensor],
    *,
    lead: int = 0,
) -> list[tuple[MomentSums, MomentSums]]:
    """(sums of what the output projection reads, of the gradients at what it gives) of each of a block's parts.

    `states` are what the block reads of each window, (1, T, D); in `above` the gradients at what it gives are replaced
    by those at what it reads. All on CPU.
    """
    sums = [MomentSums(part.output.weight_OI.shape[1], part.output.device) for part in members]
    fisher = [MomentSums(part.output.weight_OI.shape[0], part.output.device) for part in members]
    for i, (ids_T, hidden_BTD) in enumerate(zip(windows_BT, states, strict=True)):
        given_BTD = hidden_BTD.to(ids_T.device).requires_grad_()
        with torch.enable_grad(), tapped(members, [own.add for own in sums]), kept_outputs(members) as outputs:
            output_BTD = blocks.run_to_head(ids_T, block, given_BTD)
        wanted = [given_BTD, *(outputs[place] for place in range(len(members)))]
        below_BTD, *gradients = torch.autograd.grad(output_BTD, wanted, above[i].to(output_BTD.device))
        above[i] = below_BTD.cpu()
        for own, gradient in zip(fisher, gradients, strict=True):
            own.add(gradient.flatten(0, -2)[lead:])
    return list(zip(sums, fisher, strict=True))


def _walk_up(blocks: Blocks, windows_BT: Tensor, progress: Progress, stack: StateStack) -> StateStack:
    """What every block reads of each window, and on top what the head reads."""
    states = [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
    stack.push(states)
    for block in range(len(blocks)):
        progress("curves of units", block, 2 * len(blocks))
        states = pass_block(blocks, windows_BT, block, states)
        stack.push(states)
    return stack


def begin_gradients(blocks: Blocks, windows_BT: Tensor, read: Sequence[Tensor], lead: int, seed: int) -> list[Tensor]:
    """The gradient of -log p of drawn tokens at what the head reads of each window, (1, T, D), on CPU."""
    gradients = []
    for i, (ids_T, hidden_BTD) in enumerate(zip(windows_BT, read, strict=True)):
        draw = torch.Generator(ids_T.device).manual_seed(seed + i)
        with torch.enable_grad():
            fisher_TD, _ = hidden_gradients(blocks.model, ids_T, hidden_BTD[0].to(ids_T.device), draw, lead=lead)
        gradients.append(fisher_TD[None].cpu())
    return gradients


def _eliminate_all(
    members: Sequence[Part], most: Counts, sums: Sequence[tuple[MomentSums, MomentSums]]
) -> list[Elimination]:
    return [_eliminate(part, getattr(most, part.kind), *own) for part, own in zip(members, sums, strict=True)]


def _eliminate(part: Part, removed: int, sums: MomentSums, fisher: MomentSums) -> Elimination:
    try:
        metric_OO = fisher.finish().second_moment_II
    except ValueError as error:
        raise UserError(
            f"{part.output.name}: the gradient of its output is not finite; try --dtype fp32 or bf16"
        ) from error
    return eliminate_units(
        part.output.weight_OI.to(metric_OO.device),
        finish_moments(sums, part),
        metric_OO,
        part.units,
        removed,
        biased=part.bias is not None,
        together=count_together(part.kind, part.units),
    )


def count_together(kind: Kind, units: int) -> int:
    """How many of so many units go at a time."""
    return max(1, units // TOGETHER) if kind == "neurons" else 1
