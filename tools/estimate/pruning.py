"""What pruning a layer holds, multiplies out and takes, from runs of `billhook_kernels.methods` themselves.

Bytes and operations are counted on a smaller layer of the same form: all that is held at once are copies of the weight
and of the second moment, which grow with the area, and what is multiplied are the weight and the second moment. Seconds
are those of a few rows on the device, where all of them would take too long: rows are pruned independently of one
another, beside a part that all of them share.

Shape suffixes: O output features, I input features.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.alps import Spectrum
from billhook_kernels.methods import PREPARES, LayerStatistics
from billhook_kernels.obs import InverseFactor
from tools.estimate.clock import fit, time_call
from tools.estimate.meter import Meter
from tools.models.layers import Layer, list_readers
from tools.plans.methods import LEVERS
from tools.plans.pattern import count_pattern_zeros
from tools.plans.recipe import Recipe
from tools.statistics.pruned import cut_to_levels, parts_of_mask, prune_layer

SMALL = 256
"""Outputs or inputs, whichever are more, of the layer that is counted."""

ROWS = 64
"""Rows that are pruned first, to see how long all of them would take."""

FACTORED = 2048
"""Inputs of the widest layer whose second moment is really factored; a wider one takes longer by the cube of it."""

SHARE = 0.45
"""Of the weights go: what is counted and timed hardly depends on it."""

Form = tuple[int, int]
"""(outputs, inputs) of a layer."""

Run = Callable[[Recipe, Tensor, LayerStatistics], None]
"""Prunes a layer, once or to all of LEVELS."""


class Held(NamedTuple):
    """Most bytes that are held at once while one layer, the worst of a model, goes through something."""

    pruned: int
    """Pruned by whichever of the methods holds most."""
    levels: int
    """Pruned to all of LEVELS."""
    curve: int
    """Cut by the two-sided mask to all of LEVELS."""


def count_layer(forms: Iterable[Form], dtype: torch.dtype, methods: Iterable[str] = LEVERS) -> Held:
    """Over the largest layer and the widest, beside the second moment and the weight that is in the model."""
    forms = set(forms)
    worst = {max(forms, key=lambda form: form[0] * form[1]), max(forms, key=lambda form: (form[1], form[0]))}
    recipes = [Recipe(method=name, refit=True) for name in methods]  # without a refit after it none holds more
    counts = [_count_form(form, dtype, recipes) for form in worst]
    return Held(*(max(numbers) for numbers in zip(*counts, strict=True)))


def _count_form(form: Form, dtype: torch.dtype, recipes: Sequence[Recipe]) -> Held:
    small = _shrink(form, 1)
    growth = form[0] * form[1] / (small[0] * small[1])
    pruned, levels = (
        max((_count_small(recipe, small, dtype, levels=levels).peak for recipe in recipes), default=0)
        for levels in (False, True)
    )
    curve = _meter_curve(make_weight(small, dtype), make_statistics(small[1])).peak
    return Held(*(round(growth * peak) for peak in (pruned, levels, curve)))


def _shrink(form: Form, multiple: int) -> Form:
    """A layer of the same form, no side of it longer than SMALL; its inputs are a multiple of 16 and of `multiple`."""
    ratio = max(max(form) / SMALL, 1.0)
    step = 16 * multiple
    return max(16, round(form[0] / ratio)), max(step, round(form[1] / ratio / step) * step) if ratio > 1 else form[1]


def make_weight(form: Form, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Random weights (O, I), the same every time."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(*form, generator=generator).mul_(form[1] ** -0.5)
    return weight_OI.to(device, dtype)


def make_statistics(inputs: int, device: torch.device | str = "cpu") -> LayerStatistics:
    """Those of correlated inputs, some much louder than others, as in real models; gammas are for any outputs."""
    generator = torch.Generator().manual_seed(1)
    tokens = min(2 * inputs, 256)
    x_TI = torch.randn(tokens, inputs, generator=generator).to(device)
    x_TI += torch.randn(tokens, 4, generator=generator).to(device) @ torch.randn(4, inputs, generator=generator).to(
        device
    )
    x_TI *= torch.rand(inputs, generator=generator).to(device) + 0.1
    moment_II = x_TI.T @ x_TI / tokens
    return LayerStatistics(moment_II.diagonal().clone(), torch.ones(0, device=device), moment_II)


def _for_rows(statistics: LayerStatistics, weight_OI: Tensor) -> LayerStatistics:
    generator = torch.Generator().manual_seed(2)
    gamma_O = torch.rand(len(weight_OI), generator=generator) + 0.1
    return statistics.for_outputs(gamma_O.to(weight_OI.device))


def _count_zeros(recipe: Recipe, weight_OI: Tensor) -> int:
    if recipe.group is not None:
        return count_pattern_zeros(weight_OI.numel(), recipe.group)
    return round(SHARE * weight_OI.numel())


def _prune(recipe: Recipe, weight_OI: Tensor, statistics: LayerStatistics) -> None:
    prune_layer(recipe, weight_OI, _for_rows(statistics, weight_OI), _count_zeros(recipe, weight_OI))


def _cut(recipe: Recipe, weight_OI: Tensor, statistics: LayerStatistics) -> None:
    _let_go(cut_to_levels(recipe, weight_OI, _for_rows(statistics, weight_OI)))


def _let_go(parts: Iterable[Tensor]) -> None:
    """One of them is held at a time."""
    for part_OI in parts:
        del part_OI


def _meter(run: Run, recipe: Recipe, weight_OI: Tensor, statistics: LayerStatistics) -> Meter:
    fresh = LayerStatistics(*(getattr(statistics, name) for name in _FIELDS))
    meter = Meter()
    with meter:
        run(recipe, weight_OI, fresh)
    return meter


_FIELDS = ("mean_square_I", "gradient_square_O", "second_moment_II")


def _meter_curve(weight_OI: Tensor, statistics: LayerStatistics) -> Meter:
    gamma_O = _for_rows(statistics, weight_OI).gradient_square_O
    meter = Meter()
    with meter:
        _let_go(parts_of_mask(weight_OI, statistics.mean_square_I, gamma_O))
    return meter


def count_flops(recipe: Recipe, form: Form, *, levels: bool = False) -> float:
    """Of the products of pruning one layer, once or to all of LEVELS."""
    small = _shrink(form, recipe.group[1] if recipe.group else 1)
    flops = _count_small(recipe, small, torch.float32, levels=levels).flops
    return flops * (form[0] * form[1] ** 2) / (small[0] * small[1] ** 2)


class _Counted(NamedTuple):
    peak: int
    """Bytes."""
    flops: int


@functools.cache  # many forms have one small one, and what is held and what is multiplied are counted at once
def _count_small(recipe: Recipe, small: Form, dtype: torch.dtype, *, levels: bool) -> _Counted:
    """Of a layer that is pruned, once or to all of LEVELS."""
    weight_OI, statistics = make_weight(small, dtype), make_statistics(small[1])
    meter = _meter(_cut if levels else _prune, recipe, weight_OI, statistics)
    return _Counted(meter.peak, meter.flops)


# --- seconds -------------------------------------------------------------------------------------------------------


def count_layers(
    layers: Sequence[Layer], group: Mapping[str, str], times: Callable[[Layer], int]
) -> tuple[dict[Form, int], dict[int, int]]:
    """How many layers there are of each form, and how many tensors of each width they read.

    Each layer stands for so many `times`; `group` has the first layer of those that read the same.
    """
    forms, widths = Counter[Form](), Counter[int]()
    for layer in layers:
        outputs, inputs = layer.weight_OI.shape
        forms[outputs, inputs] += times(layer)
    for layer in list_readers(layers):
        if group.get(layer.name, layer.name) == layer.name:
            widths[layer.weight_OI.shape[1]] += times(layer)
    return forms, widths


def time_layers(
    recipe: Recipe,
    forms: Mapping[Form, int],
    widths: Mapping[int, int],
    dtype: torch.dtype,
    device: torch.device,
    allowance: float,
    *,
    levels: bool,
) -> float:
    """Seconds for so many layers of each form, pruned once or to all of LEVELS, one of each having been.

    `widths` are how many tensors of each width they read. A form whose rows would take longer than the `allowance`,
    seconds, is timed by a few of them.
    """
    seconds = 0.0
    for width, count in widths.items():
        statistics = make_statistics(width, device)
        seconds += count * time_preparation(recipe, statistics)
        for form, times in forms.items():
            if form[1] == width:
                seconds += times * time_rows(recipe, form, statistics, dtype, allowance, levels=levels)
    return seconds


def time_preparation(recipe: Recipe, statistics: LayerStatistics) -> float:
    """Seconds of what layers share that read the same inputs; `statistics` hold it afterwards."""
    moment_II, seconds = statistics.moment_II, 0.0
    device, inputs = moment_II.device, len(moment_II)
    if recipe.refits:
        seconds += time_call(device, lambda: statistics.damp(recipe.fit_damping))
    name = PREPARES.get(recipe.method, "system")
    if name == "system":
        return seconds
    if inputs <= FACTORED:
        return seconds + time_call(device, lambda: getattr(statistics, name))
    part = LayerStatistics(statistics.mean_square_I, statistics.gradient_square_O, moment_II[:FACTORED, :FACTORED])
    seconds += time_call(device, lambda: getattr(part, name)) * (inputs / FACTORED) ** 3
    vars(statistics)[name] = _stand_in(name, inputs, device)
    return seconds


def _stand_in(name: str, inputs: int, device: torch.device) -> InverseFactor | Spectrum:
    """What is multiplied as long as the real one."""
    eye_II, ones_I = torch.eye(inputs, device=device), torch.ones(inputs, device=device)
    if name == "factor":
        return InverseFactor(eye_II, ones_I == 0, 0.01, 0.01)
    return Spectrum(eye_II, ones_I, ones_I.double(), eye_II)


def time_rows(
    recipe: Recipe, form: Form, statistics: LayerStatistics, dtype: torch.dtype, allowance: float, *, levels: bool
) -> float:
    """Seconds of pruning all rows of a layer whose `statistics` are prepared, once or to all of LEVELS.

    All of them are pruned where that takes no longer than the `allowance`, seconds.
    """
    device = statistics.moment_II.device
    run = _cut if levels else _prune

    def take(rows: int) -> tuple[float, float]:
        weight_OI = make_weight((rows, form[1]), dtype, device)
        return rows, time_call(device, lambda: run(recipe, weight_OI, statistics))

    few = take(min(form[0], ROWS))
    if few[0] == form[0]:
        return min(few[1], take(form[0])[1])  # the first call of all pays for more than its rows
    if few[1] * form[0] / few[0] <= allowance:
        return take(form[0])[1]
    return fit(take(ROWS // 2), few).at(form[0])
