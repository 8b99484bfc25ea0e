"""How much goes of each kind: neurons and groups of heads of every block, and whole blocks, by what they cost.

Stock shapes want the same widths in all blocks that stay. So the number of neurons and that of groups of heads are
chosen once, which ones in every block. With a number of blocks gone the others are shared out by predicted KL
(`tools.surgery.curves`), over all that the config accepts. How many blocks go is measured: predictions leave out what
errors of one block do to the next, and are no measure beside the real KL without a block.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from billhook_kernels.guard import find_low
from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.base.settings import ALIGN
from tools.measure.losses import KeptStates
from tools.models.layers import find_blocks
from tools.plans.cuts import Counts, Shape, Target, Units, find_most, list_by_blocks
from tools.surgery.blocks import Drop, drop_blocks, fold_blocks
from tools.surgery.choose import ChosenCut, list_options, measure_kl
from tools.surgery.curves import Curves, measure_curves
from tools.surgery.moments import search_windows
from tools.surgery.parts import KINDS, Cut, Fit, Part, convert_size, count_weights, find_parts
from tools.surgery.rebuild import build_cut, check_buildable

DIGITS = 4
"""Of the share that goes, so that planners can write it."""


def find_target(model: Any, size: float, align: int = ALIGN) -> Target:
    """What must go so that `size` of the model's bytes stays. Raises UserError where such a cut cannot be."""
    shape = find_shape(model, align)
    removed, outside = convert_size(model, size)
    target = Target(shape=shape, share=round(removed, DIGITS))
    if not any(list_by_blocks(shape, target.share)):
        raise UserError(
            f"target_size {size:g} cannot be met: {outside:.2%} of the model's bytes are not of the "
            "blocks' linear layers, and stay; of the others a few neurons must go and some must stay: give a "
            f"{'smaller' if removed < 0.5 else 'larger'} size"
        )
    check_target(model, target)
    return target


def check_target(model: Any, target: Target) -> None:
    """Raises UserError where the architecture has no model of the shapes with as few blocks gone as can be."""
    for counts in next(filter(None, list_by_blocks(target.shape, target.share)), []):
        check_buildable(model, counts)


def find_shape(model: Any, align: int = ALIGN) -> Shape:
    """What of a model can go. Raises UserError where neurons cannot; heads that cannot are none."""
    neurons = find_parts(model, "neurons")
    depth = len(find_blocks(model))
    return Shape(
        blocks=depth,
        block_cost=count_weights(model) // depth,
        heads=_find_heads(model, align),
        neurons=_describe(model, neurons[0], align),
    )


def _find_heads(model: Any, align: int) -> Units:
    """None where they cannot be cut, or no config of the architecture can say that fewer are left (OPT)."""
    try:
        heads = _describe(model, find_parts(model, "heads")[0], align)
        for fewest in heads.options[1:2]:
            check_buildable(model, Counts(heads=fewest))
        return heads
    except UserError:
        return Units(units=1, cost=0, options=[0])


def _describe(model: Any, part: Part, align: int) -> Units:
    return Units(units=part.units, cost=part.unit_weights, options=list(list_options(model, part, align)))


def predict_kl(curves: Curves, counts: Counts, dropped: Sequence[int]) -> float:
    """What the units of the blocks that stay cost, nats per token; the dropped blocks themselves are not counted."""
    return sum(
        float(curve.cost_R[removed - 1])
        for kind, of_kind in curves.items()
        for block, curve in enumerate(of_kind)
        if block not in dropped and (removed := getattr(counts, kind))
    )


def choose_by_curves(
    model: Any,
    remove: float,
    windows_BT: Tensor,
    step: Progress,
    *,
    refit: bool = True,
    lead: int = 0,
    align: int = ALIGN,
) -> ChosenCut:
    """The cut of neurons, groups of heads and blocks that takes `remove` of the blocks' linear weights away.

    As many blocks go as `search_lowest` finds, by the cut models' KL on the first SEARCH_TOKENS of calibration text.
    Without `refit` what stays has its dense weights. The first `lead` tokens of each window are no text. Raises
    UserError where such parts cannot be cut, or not so much of them.
    """
    shape = find_shape(model, align)
    every = list_by_blocks(shape, remove)
    if not any(every):
        raise UserError(f"{remove:g} of the weights cannot be removed here: it is too much, or less than a few neurons")
    for counts in next(filter(None, every)):
        check_buildable(model, counts)
    curves = measure_curves(model, find_most(every), windows_BT, step, lead=lead)
    order, drops = drop_blocks(model, windows_BT, step, lead=lead), list[Drop]()
    tried: dict[int, tuple[float, Cut]] = {}

    def choose_counts(blocks: int) -> tuple[Counts, list[int]]:
        drops.extend(islice(order, max(blocks - len(drops), 0)))
        dropped = [drop.block for drop in drops[:blocks]]
        return min(every[blocks], key=lambda each: predict_kl(curves, each, dropped)), dropped

    def predict(blocks: int) -> tuple[float, float]:
        counts, dropped = choose_counts(blocks)
        return predict_kl(curves, counts, dropped), drops[blocks - 1].kl if blocks else 0.0

    def measure(blocks: int) -> float:
        counts, dropped = choose_counts(blocks)
        fits = make_fits(model, counts, curves, dropped, windows_BT, step, refit=refit)
        cut = Cut(counts, list(fits), tuple(sorted(dropped)))
        tried[blocks] = measure_kl(model, build_cut(model, cut), windows_BT, lead=lead), cut
        return tried[blocks][0]

    best = search_lowest([blocks for blocks, counts in enumerate(every) if counts], predict, measure)
    text = search_windows(windows_BT, lead)[:, lead:].numel()
    tokens = sum(drop.tokens for drop in drops) + len(tried) * text
    return ChosenCut(
        tried[best][1], _explain(shape, tried[best][1], [tried[blocks] for blocks in sorted(tried)]), tokens
    )


def search_lowest(
    numbers: Sequence[int], predict: Callable[[int], tuple[float, float]], measure: Callable[[int], float]
) -> int:
    """The number of blocks without which the KL is lowest of all that are measured, each of which takes a fit.

    `predict` has, of a number, the KL of the units that go beside it and that without the blocks alone. The former is
    off, as errors of one block are more to the next: it counts so many times as measured with the fewest blocks.
    Search sets out where the sum of both has its first low, and goes on to either side as long as the KL falls. What is
    predicted of more blocks than that is not asked.
    """
    units, blocks = predict(numbers[0])
    look = cache(lambda place: measure(numbers[place]))
    ratio = max(look(0) - blocks, 0.0) / units if units else 1.0

    def foresee(place: int) -> float:
        units, blocks = predict(numbers[place])
        return ratio * units + blocks

    low = find_low(find_low(0, len(numbers), foresee), len(numbers), look)
    return numbers[min(0, low, key=look)]


def make_fits(
    model: Any,
    counts: Counts,
    curves: Curves,
    dropped: Sequence[int],
    windows_BT: Tensor,
    step: Progress,
    *,
    refit: bool = True,
    kept: KeptStates | None = None,
) -> Iterator[Fit]:
    """Of every block that stays, what is left of it without the cheapest of its units, block after block.

    `kept` as `fold_blocks` has it; without `refit` there is nothing to keep.
    """
    stays = [
        (part, _keep(part, curves[kind][part.block].order_R[: getattr(counts, kind)]))
        for kind in KINDS
        if getattr(counts, kind)
        for part in find_parts(model, kind)
        if part.block not in dropped
    ]
    yield from fold_blocks(model, dropped, windows_BT, step, stays, kept) if refit else (Fit(*own) for own in stays)


def _keep(part: Part, gone: Tensor) -> Tensor:
    """Ascending indices of the units that stay."""
    stays_U = torch.ones(part.units, dtype=torch.bool, device=gone.device)
    stays_U[gone] = False
    return stays_U.nonzero()[:, 0]


def _explain(shape: Shape, best: Cut, tried: Sequence[tuple[float, Cut]]) -> str:
    words = (
        "every block that stays loses the same number, those that the least KL is predicted for: "
        f"{best.counts.heads} of {shape.heads.units} groups of heads and {best.counts.neurons} of "
        f"{shape.neurons.units} neurons; whole blocks: {', '.join(map(str, best.dropped)) or 'none'}"
    )
    measured = ", ".join(f"{cut.counts.blocks} ({kl:.3f})" for kl, cut in tried)
    return f"{words}; the number of blocks that costs the least KL on calibration text, of {measured}"
