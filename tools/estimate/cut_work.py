"""What a run does that takes whole parts away: its steps in place of a profile and of pruning, and what they cost.

The walks are timed on one block of each kind, one window each, and the choice of units and the fits on one part of each
form (`tools.estimate.units`).

Shape suffixes: B windows, T tokens, D hidden width.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from billhook_kernels.channels import HalvedSums
from tools.base.settings import WorkbenchSettings
from tools.estimate.block import Counts, Sample, build_sample, only_head
from tools.estimate.clock import time_call
from tools.estimate.cutting import BUILD, CHOOSE, CURVES, CUT, SEARCH, TIME, Cutting
from tools.estimate.prices import Prices, Pricing, Work
from tools.estimate.timing import fit_windows
from tools.estimate.units import count_elimination, count_fit, time_elimination, time_fit
from tools.measure.speeds import DECODED, PROMPT, REPEATS
from tools.plans.costs import count_cut_forwards
from tools.surgery.curves import begin_gradients, sum_moments
from tools.surgery.moments import count_searched, tapped
from tools.surgery.parts import Part, find_part

TRIED = 0.5
"""Of the blocks that stay, how many are tried once more to drop another one: 12 to 17 of 27 to 29 of SmolLM2-135M."""

SPEED = "time both models"

BUILDING = 4
"""How often the blocks of a streamed model come from disk to be written smaller, and compared with those: these once
for a look at what they return."""


def price_cut_flops(settings: WorkbenchSettings, counts: Counts, cutting: Cutting) -> Prices:
    """In floating-point operations of products, as `tools.estimate.prices.price_flops`."""
    blocks, dtype = cutting.shape.blocks, cutting.dtype
    read = 2.0 * settings.window * blocks * sum(form.inputs**2 for form in cutting.forms)
    both = 2.0 * settings.window * blocks * sum(form.inputs**2 + form.outputs**2 for form in cutting.chosen)
    return {
        "walk down": counts.forward + counts.backward + both,
        "begin": 2 * counts.head,
        "walk and sum": counts.forward + read,
        "choose": blocks * sum(count_elimination(form, dtype).flops for form in cutting.chosen),
        "fit": blocks * sum(count_fit(form, dtype).flops for form in cutting.forms),
    }


# --- seconds -------------------------------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """Seconds of one window, all blocks of the model counted where one of each kind was run."""

    down: float
    begin: float
    sums: float


def price_cut_seconds(model: Any, window: int, device: torch.device, cutting: Cutting) -> Prices:
    """In seconds, of a model on the meta device, one block of each kind of which is really run."""
    sample, blocks = build_sample(model, device), cutting.shape.blocks
    lines, _ = fit_windows(sample, window, device, partial(_walk, sample, cutting, device))
    at = _Pass(*(line.at(window) for line in lines))
    return {
        "walk down": at.down,
        "begin": at.begin,
        "walk and sum": at.sums,
        "choose": blocks * sum(time_elimination(form, cutting.dtype, device) for form in cutting.chosen),
        "fit": blocks * sum(time_fit(form, cutting.dtype, device) for form in cutting.forms),
    }


def _walk(sample: Sample, cutting: Cutting, device: torch.device, ids_T: Tensor) -> _Pass:
    x_BTD = sample.blocks.embed(ids_T)
    down = sums = 0.0
    for kind, count in enumerate(sample.counts):
        members = sample.members(kind)
        chosen, fitted = (
            [find_part(sample.model, form.kind, members) for form in forms] for forms in (cutting.chosen, cutting.forms)
        )
        above = [torch.ones_like(x_BTD)]
        down += count * time_call(
            device, partial(sum_moments, sample.blocks, kind, chosen, ids_T[None], [x_BTD.cpu()], above)
        )
        sums += count * time_call(device, partial(_walk_and_sum, sample, kind, fitted, ids_T, x_BTD))
    with only_head(sample, ids_T) as hidden_TD:
        pass
    begin = time_call(device, partial(begin_gradients, sample.blocks, ids_T[None], [hidden_TD[None]], 0, 0))
    return _Pass(down, sample.words * begin, sums)


@torch.no_grad()
def _walk_and_sum(sample: Sample, kind: int, parts: Sequence[Part], ids_T: Tensor, x_BTD: Tensor) -> None:
    """A forward of one block with the sums that fits are made of."""
    sums = [HalvedSums(part.output.weight_OI.shape[1], ids_T.device) for part in parts]
    with tapped(parts, [own.add for own in sums]):
        sample.blocks.run(ids_T, kind, x_BTD)


# --- steps ---------------------------------------------------------------------------------------------------------


def list_cut_work(settings: WorkbenchSettings, cutting: Cutting, pricing: Pricing) -> list[Work]:
    """What a run does in place of a profile, and to cut in each of its rounds."""
    windows, window = settings.count_in_proportion(), settings.window
    text = f"{windows} windows of {window} tokens of calibration text"
    blocks, kinds = cutting.shape.blocks, " and ".join(form.kind for form in cutting.chosen)
    steps = []
    if cutting.timed:
        step, shapes = partial(_time_models, pricing), len(cutting.timed)
        steps.append(step(TIME, f"{shapes} of them beside the dense model, then one", shapes + 1 + 2))
    steps.append(
        pricing.step(
            CURVES,
            f"two forwards and a backward of {text}",
            1,
            1.0,
            {"forward": windows, "begin": windows, "walk down": windows},
            2,
        )
    )
    if cutting.chosen:
        most = ", ".join(f"{form.most:,} of {form.units:,} {form.kind}" for form in cutting.chosen)
        steps.append(pricing.step(CHOOSE, f"{most} of each of {blocks} blocks, at most", 1, 1.0, {"choose": 1}, 0))
    steps += _list_search(settings, cutting, pricing)
    forwards = count_cut_forwards(len(cutting.chosen))
    steps.append(
        pricing.step(
            CUT,
            f"{forwards} forwards of {text}, and a fit of what reads the {kinds or 'neurons'} of {blocks} blocks",
            cutting.rounds,
            1.0,
            {"walk and sum": windows, "forward": (forwards - 1) * windows, "fit": 1},
            2,
        )
    )
    return steps


def _list_search(settings: WorkbenchSettings, cutting: Cutting, pricing: Pricing) -> list[Work]:
    """Without a block only those above it run once more."""
    windows, blocks = min(count_searched(settings.window), settings.count_in_proportion()), cutting.shape.blocks
    text = f"{windows} windows of {settings.window} tokens"
    all_above = windows * (blocks + 1) / 2

    def search(name: str, how: str, times: int, tried: float, forwards: int) -> Work:
        done = {"forward": forwards * windows + tried * all_above, "divergence": tried * blocks * windows}
        return pricing.step(name, how, times, 1.0, done, forwards + math.ceil(tried * (blocks + 1) / 2))

    steps = []
    if cutting.most.blocks > 0:
        how = f"each of {blocks} left out in a forward of {text} that begins there"
        steps.append(search(SEARCH, how, 1, 1.0, 2))
    if cutting.most.blocks > 1:
        how = f"about half of the others left out once more, as of SmolLM2; all at most: {text}"
        steps.append(search(f"{SEARCH}, each further one", how, cutting.most.blocks - 1, TRIED, 1))
    return steps


def list_cut_end(pricing: Pricing, *, streamed: bool = False) -> list[Work]:
    """What a run does at its end with the smaller model: one that is streamed is not timed."""
    if streamed:
        return [pricing.step(BUILD, "written once, and compared block by block", 1, 1.0, {}, BUILDING)]
    return [_time_models(pricing, SPEED, "the dense one and the smaller one, which takes less", 2)]


def _time_models(pricing: Pricing, name: str, how: str, models: int) -> Work:
    often = models * (REPEATS + 1)
    words = f"{REPEATS + 1} forwards of a window and {DECODED} tokens behind {PROMPT}, of each"
    return pricing.step(name, f"{how}: {words}", 1, 1.0, {"forward": often, "word": often * (1 + DECODED)})
