"""What it takes to choose the units that go and to fit the rest, from runs of `billhook_kernels.channels` themselves.

All parts are of one form. Bytes and operations are counted on a smaller part of the same form: what is held are
matrices over its channels, which grow with the area, and what is multiplied grows with the cube. Seconds are those of
the part itself; of one wider than FACTORED they are those of one as wide as that, by the cube.

Shape suffixes: T tokens, O output features, I input channels.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.channels import HalvedSums, MomentSums, eliminate_units, expand_units, fit_kept
from tools.estimate.clock import time_call
from tools.estimate.meter import Meter
from tools.estimate.pruning import FACTORED, make_weight
from tools.surgery.curves import count_together
from tools.surgery.parts import Kind

SMALL = 128
"""Channels, or inputs of what is fitted, whichever are more, of the part that is counted."""

Run = Callable[[], object]


class PartForm(NamedTuple):
    """The heads or the neurons of a block, all blocks being alike, and how many of them go."""

    kind: Kind
    units: int
    inputs: int
    """Channels of all units together, which the output projection reads."""
    outputs: int
    most: int
    """Units that go at most."""
    least: int
    """Units that go at least where some do."""
    biased: bool
    """Whether the output projection has a bias."""
    folds: bool
    """Whether its fit may have to make up for whole blocks."""

    @property
    def width(self) -> int:
        """Channels of one unit."""
        return self.inputs // self.units

    def shrink(self, inputs: int) -> "PartForm":
        """A part of the same form of about so many channels; itself where it has no more."""
        if self.inputs <= inputs:
            return self
        units = inputs if self.kind == "neurons" else self.units
        channels = units * max(1, inputs // units)
        ratio, share = channels / self.inputs, units / self.units
        most, least = (min(math.ceil(share * count), units - 1) for count in (self.most, self.least))
        outputs = max(1, round(ratio * self.outputs))
        return self._replace(units=units, inputs=channels, outputs=outputs, most=most, least=least)


class Needed(NamedTuple):
    """What one part takes."""

    bytes: int
    """Held at once, at most, beside its sums and the weight that is in the model."""
    flops: float
    """Of its products."""


def count_elimination(form: PartForm, dtype: torch.dtype) -> Needed:
    """Of choosing all units of a part that may go."""
    return _count(prepare_elimination, form, dtype)


def count_fit(form: PartForm, dtype: torch.dtype) -> Needed:
    """Of the fit of what reads the units of a part that stay, at most."""
    return _count(prepare_fit, form, dtype)


def time_elimination(form: PartForm, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of choosing all units of a part that may go."""
    return _time(prepare_elimination, form, dtype, device)


def time_fit(form: PartForm, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the fit of what reads the units of a part that stay, at most."""
    return _time(prepare_fit, form, dtype, device)


def prepare_elimination(form: PartForm, dtype: torch.dtype, device: torch.device | str = "cpu") -> Run:
    """What chooses the units that go, from sums that are there."""
    weight_OI = make_weight((form.outputs, form.inputs), dtype, device)
    sums, fisher = (MomentSums(channels, weight_OI.device) for channels in (form.inputs, form.outputs))
    for own, channels in ((sums, form.inputs), (fisher, form.outputs)):
        own.add(_make_batch(channels, device))
    return lambda: eliminate_units(
        weight_OI,
        sums.finish(),
        fisher.finish().second_moment_II,
        form.units,
        form.most,
        biased=form.biased,
        together=count_together(form.kind, form.units),
    )


def prepare_fit(form: PartForm, dtype: torch.dtype, device: torch.device | str = "cpu") -> Run:
    """What fits the output projection to the units that stay, from sums that are there."""
    weight_OI = make_weight((form.outputs, form.inputs), dtype, device)
    sums = HalvedSums(form.inputs, weight_OI.device)
    for seed in (0, 1):
        x_TI = _make_batch(form.inputs, device, seed)
        sums.add(x_TI, x_TI.new_ones(len(x_TI), form.outputs) if form.folds else None)
    bias_O = weight_OI.new_zeros(form.outputs) if form.biased else None
    kept_K = expand_units(torch.arange(form.units - form.least, device=weight_OI.device), form.width)
    return lambda: fit_kept(weight_OI, bias_O, sums.finish(), kept_K)


def _make_batch(channels: int, device: torch.device | str, seed: int = 0) -> Tensor:
    """Inputs of as many tokens as there are channels, or of fewer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(min(channels, 256), channels, generator=generator).to(device)


def _count(prepare: Callable[..., Run], form: PartForm, dtype: torch.dtype) -> Needed:
    small = form.shrink(SMALL)
    counted = _count_small(prepare, small, dtype)
    area = form.inputs * max(form.inputs, form.outputs) / (small.inputs * max(small.inputs, small.outputs))
    return Needed(round(area * counted.bytes), counted.flops * (form.inputs / small.inputs) ** 3)


@functools.cache
def _count_small(prepare: Callable[..., Run], small: PartForm, dtype: torch.dtype) -> Needed:
    run = prepare(small, dtype)
    meter = Meter()
    with meter:
        run()
    return Needed(meter.peak, meter.flops)


def _time(prepare: Callable[..., Run], form: PartForm, dtype: torch.dtype, device: torch.device) -> float:
    part = form.shrink(FACTORED)
    return time_call(device, prepare(part, dtype, device)) * (form.inputs / part.inputs) ** 3
