"""What a planner may find out before it commits itself to a plan: plain functions that answer in figures.

Each leaves the weights in the model as it found them, bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from tools.base.errors import ImpossiblePlan, UserError
from tools.base.progress import Progress
from tools.measure.losses import Evaluation, compare_kl
from tools.measure.texts import list_texts
from tools.plans.layer_profile import LEVELS, LayerProfile, predict_kl
from tools.plans.recipe import MAX_ADJUSTMENTS, Adjustment, Recipe
from tools.plans.selectors import select_layers
from tools.plans.work_order import WorkOrder
from tools.workbench.bench import Workbench
from tools.workbench.store import DENSE

MAX_INSPECTED = 24
"""Layers that one look shows one by one."""
MAX_GROUPS = 48
"""Groups of layers whose shares a prediction names."""

Figures = dict[str, Any]


class Draft(BaseModel):
    """A plan as far as instruments need it; whatever else a plan has is left out of account."""

    sparsity: float = Field(gt=0, lt=1, description="Share of all prunable weights to be zero, as a fraction.")
    recipe: Recipe = Field(default_factory=Recipe, description="How weights are chosen and shared out.")
    adjustments: list[Adjustment] = Field(
        default_factory=list, max_length=MAX_ADJUSTMENTS, description="Corrections for groups of layers."
    )


@dataclass(frozen=True)
class Round:
    """What the instruments of one round work on."""

    bench: Workbench
    profile: str
    resolve: Callable[[Draft], WorkOrder]
    """What a draft comes to within all bounds, by the curves that its recipe asks for, which are measured if need be;
    the weights in the model stay as they are. Raises ImpossiblePlan."""
    progress: Progress
    present: str = DENSE
    """The checkpoint whose weights are in the model."""
    keep: Sequence[str] = ()
    """Other checkpoints that are still needed."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Selectors and the layers they mean, by which a prediction sums up."""
    book: Callable[[int, Sequence[WorkOrder]], None] = lambda tokens, orders: None
    """Told of a probe before it is made: the tokens that it measures on, all orders together, and the orders; raises
    ValueError when what that takes is not to be had."""


def inspect_layers(round_: Round, selector: str) -> Figures:
    """The whole profile of the layers that a selector means, of at most `MAX_INSPECTED` one by one.

    KL curves are in nats per token at `LEVELS`. Raises ImpossiblePlan when the selector means nothing.
    """
    layers = round_.bench.read_profile(round_.profile).layers
    now = dict(zip(round_.bench.by_name, round_.bench.sparsities(), strict=True))
    names = set(select_layers(selector, layers))
    chosen = [layer for layer in layers if layer.name in names]
    total = sum(layer.weights for layer in chosen)
    curves = np.sum([layer.kappa for layer in chosen], axis=0)
    figures: Figures = {
        "layers": len(chosen),
        "weights": total,
        "sparsity_now": _round(sum(now[layer.name] * layer.weights for layer in chosen) / total),
        "kl_together": {f"{level:g}": _round(kl) for level, kl in zip(LEVELS, curves, strict=True)},
        "columns": f"name weights sparsity_now wanda_z grad_z {' '.join(f'kl{level:g}' for level in LEVELS)}",
        "rows": [_describe_layer(layer, now[layer.name]) for layer in chosen[:MAX_INSPECTED]],
    }
    return figures | ({"rows_left_out": len(chosen) - MAX_INSPECTED} if len(chosen) > MAX_INSPECTED else {})


def _describe_layer(layer: LayerProfile, sparsity: float) -> str:
    figures = [sparsity, layer.wanda_z, layer.gradient_z, *layer.kappa]
    return f"{layer.name} {layer.weights} {' '.join(f'{figure:.3g}' for figure in figures)}"


def predict(round_: Round, draft: Draft) -> Figures:
    """What a draft's exact allocation comes to, by KL curves alone; nothing is pruned.

    `predicted_kl` is by the curves that the draft's recipe asks for, `mask_kl` by those of the profile. Curves of a
    method that nobody asked for before are measured first. Raises ImpossiblePlan.
    """
    order = round_.resolve(draft)
    layers = {layer.name: layer for layer in round_.bench.read_profile(round_.profile).layers}
    zeros = order.zeros
    shares = {name: count / layers[name].weights for name, count in zeros.items()}
    mask_kl = _sum_kl(layers, shares, list(layers))
    rows = [
        (
            selector,
            sum(zeros[name] for name in names) / sum(layers[name].weights for name in names),
            _sum_kl(layers, shares, names) / (mask_kl or 1.0),
        )
        for selector, names in round_.groups.items()
    ]
    rows.sort(key=lambda row: -row[2])
    figures: Figures = {
        "sparsity": _round(order.sparsity),
        "predicted_kl": _round(order.predicted_kl),
        "mask_kl": _round(mask_kl),
        "columns": "group: sparsity, share of mask_kl",
        "groups": {selector: [_round(share), _round(kl)] for selector, share, kl in rows[:MAX_GROUPS]},
    }
    return figures | ({"groups_left_out": len(rows) - MAX_GROUPS} if len(rows) > MAX_GROUPS else {})


def _sum_kl(layers: Mapping[str, LayerProfile], shares: Mapping[str, float], names: Sequence[str]) -> float:
    return predict_kl([layers[name] for name in names], np.array([shares[name] for name in names]))


def probe(round_: Round, drafts: Sequence[Draft], tokens: int) -> list[Figures]:
    """Carry drafts out and measure each on the first `tokens` tokens of the validation text, rounded up to windows.

    Figures are paired with the dense model's on the same text, and with those of the present weights where they are
    not the dense ones: `kl_change` is the draft's KL minus theirs. Of a draft that cannot be, or breaks while it is
    carried out, there is `error` alone. Raises ImpossiblePlan when none can, and ValueError when there are not the
    tokens for all that can.
    """
    bench, found = round_.bench, [_try_to_resolve(round_, draft) for draft in drafts]
    orders = {number: order for number, order in enumerate(found) if isinstance(order, WorkOrder)}
    if not orders:
        raise ImpossiblePlan("; ".join(dict.fromkeys(map(str, found))))
    asked = min(math.ceil(tokens / bench.settings.window), len(bench.windows.validation))
    windows = len(bench.losses.list_first(asked))
    round_.book(len(orders) * windows * bench.settings.window, list(orders.values()))
    evaluations = bench.probe(
        round_.profile,
        list(orders.values()),
        windows,
        round_.progress,
        back=round_.present,
        keep=round_.keep,
    )
    figures: list[Figures] = [{"error": problem} for problem in found]
    for (number, order), measured in zip(orders.items(), evaluations, strict=True):
        if isinstance(measured, str):
            figures[number] = {"error": measured}
        else:
            figures[number] = _describe_probe(round_, order, measured, windows)
    if all("error" in figure for figure in figures):
        raise ImpossiblePlan("; ".join(dict.fromkeys(figure["error"] for figure in figures)))
    return figures


def _try_to_resolve(round_: Round, draft: Draft) -> WorkOrder | str:
    """What the draft comes to, or why it cannot be."""
    try:
        return round_.resolve(draft)
    except UserError:  # a full disk, say
        raise
    except ValueError as error:
        return str(error)


def _describe_probe(round_: Round, order: WorkOrder, evaluation: Evaluation, windows: int) -> Figures:
    bench = round_.bench
    figures: Figures = {
        "tokens": windows * bench.settings.window,
        "sparsity": _round(order.sparsity),
        "predicted_kl": _round(order.predicted_kl),
        "kl": _round(evaluation.mean_kl),
        "kl_error": _round(evaluation.kl_error),
        "perplexity": _round(evaluation.perplexity),
        "dense_perplexity": _round(_take(bench, bench.read_profile(round_.profile).dense, windows).perplexity),
    }
    if evaluation.texts:
        figures |= {
            "texts": {x.name: {"kl": _round(x.kl), "kl_error": _round(x.kl_error)} for x in list_texts(evaluation)}
        }
    if round_.present == DENSE or not evaluation.finite:
        return figures
    present = bench.evaluate(round_.present, "validation", round_.profile, round_.progress)
    change, error = compare_kl(evaluation, _take(bench, present, windows))
    return figures | {"kl_change": _round(change), "kl_change_error": _round(error)}


def _take(bench: "Workbench", evaluation: Evaluation, windows: int) -> Evaluation:
    """Of losses on the whole validation text those that a probe of so many windows has, too."""
    return evaluation.take(bench.losses.list_first(windows))


def _round(value: float | None) -> float | None:
    """Four significant digits; None for what is not finite, as JSON has no word for it."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
