"""What of decoding a token is spent in which parts, by models of other shapes that are timed beside the dense one."""

from typing import Any

import torch
from torch import Tensor

from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.base.settings import ALIGN
from tools.measure.speeds import measure_speeds
from tools.plans.cuts import Counts, Shape, Target, list_by_blocks
from tools.surgery.parts import KINDS, Cut, Fit, find_parts
from tools.surgery.rebuild import build_cut
from tools.surgery.share import find_shape

LEAST = 0.01
"""Of a block's seconds, what all its neurons cost at least: noise does not make them free."""


MOST = 1.5
"""How far the last timing may correct the share: beyond it is noise."""


def price_parts(model: Any, speed: float, ids_T: Tensor, progress: Progress, align: int = ALIGN) -> Target:
    """What must go so that `speed` times as many tokens a second are decoded, costs in seconds a token.

    Blocks, neurons and groups of heads are timed by a shape that lacks many of one kind, by turns with the dense
    model; then a shape that these costs expect to be as fast as is asked, which corrects the share. Raises UserError
    where such a speed is not to be had.
    """
    shape = find_shape(model, align)
    lacking = list_lacking(shape)
    dense, *saved = _time_shapes(model, list(lacking.values()), ids_T, progress)
    block, head, neuron = (max(dense - seconds, 0.0) for seconds in saved)
    block /= lacking["blocks"].blocks
    head /= max(lacking["heads"].heads, 1) * shape.blocks
    neuron /= max(lacking["neurons"].neurons, 1) * shape.blocks
    if not block:
        raise UserError(f"target_speed {speed:g} cannot be met: decoding was no faster here without blocks")
    neuron = max(neuron, LEAST * block / shape.neurons.units)
    priced = Shape(
        counts="decoding time",
        blocks=shape.blocks,
        block_cost=block,
        heads=shape.heads.model_copy(update={"cost": head}),
        neurons=shape.neurons.model_copy(update={"cost": neuron}),
    )
    saving = 1 - 1 / speed
    share = saving * dense / (shape.blocks * block)
    # the machine may have become slower or faster: a timing is compared with the dense model's beside it
    dense, found = _time_shapes(model, [_find_counts(priced, share, speed)], ids_T, progress)
    if found < dense:
        share *= min(max(saving * dense / (dense - found), 1 / MOST), MOST)
    _find_counts(priced, share, speed)
    return Target(shape=priced, share=share)


def list_lacking(shape: Shape) -> dict[str, Counts]:
    """What the shapes lack by which blocks, neurons and groups of heads are timed; half of the units of a block."""
    return {
        "blocks": Counts(blocks=max(1, shape.blocks // 4)),
        "heads": Counts(heads=shape.heads.options[len(shape.heads.options) // 2]),
        "neurons": Counts(neurons=shape.neurons.options[len(shape.neurons.options) // 2]),
    }


def _find_counts(priced: Shape, share: float, speed: float) -> Counts:
    """What goes for such a share, with as few blocks as can be. Raises UserError where nothing comes to it."""
    counts = next((listed[0] for listed in list_by_blocks(priced, share) if listed), None)
    if counts is None:
        raise UserError(
            f"target_speed {speed:g} cannot be met: no number of neurons, heads and blocks comes to it by the seconds "
            "that decoding took here; ask for less, or again where nothing else runs"
        )
    return counts


def _time_shapes(model: Any, shapes: list[Counts], ids_T: Tensor, progress: Progress) -> list[float]:
    """Seconds a token of the dense model, then of each of these shapes, whatever it keeps."""
    cuts = [build_cut(model, _cut_anyhow(model, counts)) for counts in shapes]
    return [1 / decoded for _, decoded in measure_speeds([model, *cuts], ids_T, progress)]


def _cut_anyhow(model: Any, counts: Counts) -> Cut:
    """A cut of these counts whose last units and blocks go."""
    blocks = find_shape(model).blocks
    dropped = tuple(range(blocks - counts.blocks, blocks))
    fits = [
        Fit(part, torch.arange(part.units - getattr(counts, kind), device=model.device))
        for kind in KINDS
        if getattr(counts, kind)
        for part in find_parts(model, kind)
        if part.block not in dropped
    ]
    return Cut(counts, fits, dropped)
