"""What it costs to take units away: the KL predicted for every number of neurons, or of groups of heads, of a block.

One walk up through the blocks, one down: gradients of -log p of tokens that the model draws itself, at what the output
projections give, make the Fisher information of their outputs; what they read makes A. No unit is taken away to measure
it. The moments of one block are held at a time; what the blocks below read waits on disk.

Shape suffixes: B windows, T tokens, D hidden width, I input channels, O output features.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from billhook_kernels.channels import Elimination, MomentSums, eliminate_units
from tools.base.errors import UserError
from tools.base.progress import Progress, heed_stop
from tools.models.blocks import Blocks
from tools.models.layers import find_device
from tools.models.readout import begin_draw, hidden_gradients
from tools.plans.cuts import Counts
from tools.statistics.passage import Stack
from tools.statistics.shards import StateStack
from tools.surgery.blocks import pass_block
from tools.surgery.moments import finish_moments, kept_outputs, tapped
from tools.surgery.parts import KINDS, Kind, Part, find_parts

TOGETHER = 96
"""Of the neurons of a block, so many parts of them go at a time: a hundredth of thousands."""

Curves = dict[Kind, list[Elimination]]
"""Of every kind, by block: its units in the order in which they go, and the predicted KL of all up to each."""


@dataclass
class CurveWalk:
    """How far all windows have come."""

    inputs: Stack
    """What each block reads of each window: on the way up the next block's on top, on the way down too."""
    left: int | None = None
    """Blocks that are still to be passed on the way down; None on the way up."""
    above: list[Tensor] = field(default_factory=list)
    """Gradients at what the next block down gives of each window, (1, T, D); on CPU."""
    curves: Curves = field(default_factory=dict)
    """Of the blocks that were passed on the way down."""


class KeptCurves(Protocol):
    """Whoever keeps how far a walk has come, so that one that was killed goes on there."""

    def begin_stack(self) -> Stack:
        """An empty one, for what blocks read."""

    def read(self) -> CurveWalk | None:
        """What was kept; None where nothing is."""

    def keep(self, walk: CurveWalk) -> None:
        """Keep it in the place of what was kept before."""


def measure_curves(
    model: Any,
    most: Counts,
    windows_BT: Tensor,
    progress: Progress,
    *,
    lead: int = 0,
    seed: int = 0,
    kept: KeptCurves | None = None,
) -> Curves:
    """The curves of as many units as `most` has of each kind, in nats per token, where the rest is fitted.

    The first `lead` tokens of each window are no text. What blocks read lies where it is `kept`, or else in a file
    without a name. Raises UserError where moments or gradients are not finite, or such parts cannot be cut, and
    DiskFull.
    """
    blocks = Blocks(model)
    parts = {kind: find_parts(model, kind) for kind in KINDS if getattr(most, kind)}
    walk = _take_up(kept)
    if walk.left is None:
        _walk_up(blocks, windows_BT, progress, walk, kept)
        walk.above = begin_gradients(blocks, windows_BT, walk.inputs.pop(), lead, seed)
        walk.left, walk.curves = len(blocks), {kind: [] for kind in parts}
    while walk.left:
        if kept:
            kept.keep(walk)
        block = walk.left - 1
        progress("curves of units", 2 * len(blocks) - 1 - block, 2 * len(blocks))
        members = [of_kind[block] for of_kind in parts.values()]
        sums = sum_moments(blocks, block, members, windows_BT, walk.inputs.pop(), walk.above, lead=lead)
        for part, curve in zip(members, _eliminate_all(members, most, sums), strict=True):
            walk.curves[part.kind].insert(0, curve)
        del sums  # before those of the next block are made
        walk.left = block
    progress("curves of units", 1, 1)
    return walk.curves


def _take_up(kept: KeptCurves | None) -> CurveWalk:
    if kept is None:
        return CurveWalk(StateStack(Path(tempfile.gettempdir())))
    return kept.read() or CurveWalk(kept.begin_stack())


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
        heed_stop()
        given_BTD = hidden_BTD.to(ids_T.device).requires_grad_()
        with torch.enable_grad(), tapped(members, [own.add for own in sums]), kept_outputs(members) as outputs:
            output_BTD = blocks.run_to_head(ids_T, block, given_BTD)
        wanted = [given_BTD, *(outputs[place] for place in range(len(members)))]
        below_BTD, *gradients = torch.autograd.grad(output_BTD, wanted, above[i].to(output_BTD.device))
        above[i] = below_BTD.cpu()
        for own, gradient in zip(fisher, gradients, strict=True):
            own.add(gradient.flatten(0, -2)[lead:])
    return list(zip(sums, fisher, strict=True))


def _walk_up(blocks: Blocks, windows_BT: Tensor, progress: Progress, walk: CurveWalk, kept: KeptCurves | None) -> None:
    """Put on the stack what every block reads of each window, and on top what the head reads."""
    inputs = walk.inputs
    states = inputs.pop() if inputs.height else [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
    inputs.push(states)
    for block in range(inputs.height - 1, len(blocks)):
        if kept:
            kept.keep(walk)
        progress("curves of units", block, 2 * len(blocks))
        states = pass_block(blocks, windows_BT, block, states)
        inputs.push(states)


def begin_gradients(blocks: Blocks, windows_BT: Tensor, read: Sequence[Tensor], lead: int, seed: int) -> list[Tensor]:
    """The gradient of -log p of drawn tokens at what the head reads of each window, (1, T, D), on CPU."""
    gradients, device = [], find_device(blocks.model.get_output_embeddings())
    for i, (ids_T, hidden_BTD) in enumerate(zip(windows_BT, read, strict=True)):
        heed_stop()
        draw = begin_draw(device, seed, i)
        with torch.enable_grad():
            fisher_TD, _ = hidden_gradients(blocks.model, ids_T, hidden_BTD[0].to(device), draw, lead=lead)
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
