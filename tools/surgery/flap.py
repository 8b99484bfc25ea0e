"""FLAP (arXiv 2312.11983) as its authors run it (github.com/CASIA-IVA-Lab/FLAP, metric WIFV, structure AL-AM).

Neurons and groups of heads are ranked over the whole model, so that blocks end with different widths; nothing that
stays is changed, and a bias makes up for the mean of what went. No stock config describes such widths: the model is a
copy with hooks, which computes what the narrow one would.

- Score of a channel of an output projection: its fluctuation, the variance of what is read times the squared length of
  the column; in attention the square of that, as the authors' code has it. Standardised over the channels of the
  layer; a unit's score is the mean of its channels'. (The authors update their variance window by window, from
  running means and without the first window; here it is the variance over all tokens. A factor that all channels of a
  layer share has no effect.)
- The units that stay are the highest-scored of all blocks, whose weights together come nearest to the share that shall
  stay. As there, each unit counts as the weights that go with it (a head of LLaMA as 512/3 neurons), and the share is
  one of the weights of the blocks' linear layers. (The authors' comparison also takes the unit at the threshold away.)
- Statistics are the dense model's, in every block: what went is masked when all is measured.
- A unit of attention is a KV head with the query heads that read it. The authors' code knows no grouped-query
  attention; where every query head has a KV head of its own this is their unit, a head.
- The text is the caller's. The authors take 1,024 windows of 128 tokens of WikiText-2's training split, windows of the
  length at which they evaluate.

Shape suffixes: B windows, T tokens, O output features, I input channels, U units of a part, N units of all parts.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from billhook_kernels.channels import ChannelSums, mark_kept, score_fluctuation, standardise
from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.models.blocks import Blocks
from tools.models.readout import compute_hidden
from tools.models.unfinished import hold_states
from tools.surgery.blocks import pass_on
from tools.surgery.moments import tapped
from tools.surgery.parts import KINDS, Fit, Part, find_parts
from tools.surgery.rebuild import TOLERANCE, copy_sharing, mark_channels, mask_input, masked


class Narrowed(NamedTuple):
    """A part that loses units."""

    part: Part
    units: Tensor
    """Ascending indices of the units that stay."""
    shift_O: Tensor
    """What the others gave on average: the columns that go, times the mean of what they read; in the weight's dtype."""


class Ranking(NamedTuple):
    """What goes of a model."""

    narrowed: list[Narrowed]
    removed: float
    """Share of the weights of the blocks' linear layers that goes; the biases that come are not counted."""


@torch.no_grad()
def rank_units(model: Any, remove: float, windows_BT: Tensor, progress: Progress) -> Ranking:
    """What goes so that `remove` of the weights of the blocks' linear layers does, as nearly as units allow.

    Raises UserError where heads or neurons cannot be cut, or what they read is not finite.
    """
    parts = [part for kind in KINDS for part in find_parts(model, kind)]
    spreads = _measure_spreads(model, parts, windows_BT, progress)
    scores = [score_units(part, variance_I) for part, (_, variance_I) in zip(parts, spreads, strict=True)]
    costs = [scores[0].new_full((part.units,), part.unit_weights) for part in parts]
    cost_N = torch.cat(costs)
    stays_N = mark_kept(torch.cat(scores), cost_N, 1 - remove)
    narrowed = []
    for part, stays_U, (mean_I, _) in zip(parts, stays_N.split([part.units for part in parts]), spreads, strict=True):
        if not bool(stays_U.all()):
            gone_I = (~stays_U).repeat_interleave(len(mean_I) // part.units)
            shift_O = part.output.weight_OI.double() @ (mean_I * gone_I)
            narrowed.append(Narrowed(part, stays_U.nonzero()[:, 0], shift_O.to(part.output.weight_OI.dtype)))
    return Ranking(narrowed, float(cost_N[~stays_N].sum() / cost_N.sum()))


def score_units(part: Part, variance_I: Tensor) -> Tensor:
    """The standardised score of every unit of a part, to be compared with those of all others: (U,), fp64."""
    score_I = score_fluctuation(part.output.weight_OI, variance_I)
    if part.kind == "heads":
        score_I = score_I.square()
    return standardise(score_I).view(part.units, -1).mean(1)


def _measure_spreads(
    model: Any, parts: Sequence[Part], windows_BT: Tensor, progress: Progress
) -> list[tuple[Tensor, Tensor]]:
    """(mean, variance) of what each part's output projection reads in the dense model, by one walk over the windows."""
    blocks = Blocks(model)
    sums = [ChannelSums(part.output.weight_OI.shape[1], windows_BT.device) for part in parts]
    states = hold_states(model, range(len(windows_BT)), lambda window: blocks.embed(windows_BT[window]))
    for block in range(len(blocks)):
        progress("measure fluctuations", block, len(blocks))
        members = [(part, own) for part, own in zip(parts, sums, strict=True) if part.block == block]
        with tapped([part for part, _ in members], [own.add for _, own in members]):
            pass_on(blocks, windows_BT, states, range(block, block + 1))
    progress("measure fluctuations", len(blocks), len(blocks))
    spreads = [own.spread() for own in sums]
    for part, (_, variance_I) in zip(parts, spreads, strict=True):
        if not bool(torch.isfinite(variance_I).all()):
            raise UserError(
                f"{part.output.name}: what it reads of the calibration text is not finite; try --dtype fp32"
            )
    return spreads


def build_narrowed(model: Any, narrowed: Sequence[Narrowed]) -> Any:
    """The model without what went: a copy that shares every weight with it, with hooks at the output projections."""
    built = copy_sharing(model)
    for part, units, shift_O in narrowed:
        module = built.get_submodule(part.output.name)
        module.register_forward_pre_hook(mask_input(mark_channels(units, part.units, part.output.weight_OI[0])))
        module.register_forward_hook(_add(shift_O))
    return built


def _add(shift_O: Tensor) -> Callable[..., Tensor]:
    return lambda _module, _inputs, output: output + shift_O


@torch.no_grad()
def check_narrowed(model: Any, narrowed: Sequence[Narrowed], ids_T: Tensor) -> None:
    """Compare what is masked where output projections read it with the rows of the layers before them gone.

    Raises UserError where they differ, as where heads lie in an order that is not known here: the weights that are
    counted as gone would not be those that are not needed.
    """
    fits = [Fit(part, units) for part, units, _ in narrowed]
    with masked(fits):
        expected_BTD = compute_hidden(model, ids_T[None]).float()
    with ExitStack() as undo:
        for part, units, _ in narrowed:
            for layer in part.inputs:
                stays_O = mark_channels(units, part.units, layer.weight_OI[:, 0])
                undo.callback(layer.module.register_forward_hook(_mask_output(stays_O)).remove)
        found_BTD = compute_hidden(model, ids_T[None]).float()
    if not float((found_BTD - expected_BTD).norm() / expected_BTD.norm()) <= TOLERANCE:
        raise UserError(f"the heads or neurons of {type(model).__name__} lie in an order that is not supported")


def _mask_output(stays_O: Tensor) -> Callable[..., Tensor]:
    return lambda _module, _inputs, output: output * stays_O
