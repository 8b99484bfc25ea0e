"""What a planner may find out before it commits itself to a plan: plain functions that answer in figures.

Each leaves the weights in the model as it found them, bit for bit.
"""

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, model_validator

from tools.base.errors import ImpossiblePlan, UserError
from tools.base.progress import Progress
from tools.instruments.comparisons import Figures, compare_probes, find_best_whole, round_figure
from tools.instruments.probed import PastProbe, Probed, count_rest, find_known, remember_probe
from tools.measure.recall import list_texts
from tools.plans.cuts import Cutting
from tools.plans.groups import MAX_GROUPS, Group
from tools.plans.layer_profile import LEVELS, MOST_SELECTOR, LayerProfile, predict_kl, select_layers
from tools.plans.recipe import MAX_ADJUSTMENTS, Adjustment, Recipe
from tools.plans.work_order import WorkOrder, prune_alone
from tools.results.losses import Evaluation, compare_kl
from tools.results.schema import TextFigures
from tools.workbench.bench import Workbench
from tools.workbench.evaluate import Probe, probe_orders
from tools.workbench.store import DENSE

Result = TypeVar("Result")

MAX_INSPECTED = 40
"""Layers that one look, or one prediction, shows one by one."""
MAX_TOLD_GROUPS = 48
"""Groups of layers whose shares a prediction names."""

LATE = "not begun: those before it took all the seconds that were left"
"""Of a probe of several plans, for those that were not come to."""


OF_PLANS = {"hypothesis", "reason", "reprofile", "multipliers"}
"""What else a plan says, and what instruments leave out of account."""


class Draft(BaseModel):
    """A plan as far as instruments need it. What is no part of a plan is refused: a misspelt lever would be measured
    without it."""

    sparsity: float = Field(gt=0, lt=1, description="Share of all prunable weights to be zero, as a fraction.")
    recipe: Recipe = Field(default_factory=Recipe, description="How weights are chosen and shared out.")
    groups: list[Group] = Field(
        default_factory=list,
        max_length=MAX_GROUPS,
        exclude_if=operator.not_,
        description="Other recipes for some layers.",
    )
    adjustments: list[Adjustment] = Field(
        default_factory=list, max_length=MAX_ADJUSTMENTS, description="Corrections for groups of layers."
    )
    cut: Cutting | None = Field(
        None, exclude_if=lambda cut: cut is None, description="How it is shared out, where whole parts go."
    )
    alone: str = Field(
        "",
        max_length=MOST_SELECTOR,
        exclude=True,
        description="Layers that alone are pruned, each to its share of the whole plan; all others stay dense.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("new_texts"):
            raise ValueError("new_texts are written for a round's plan alone; instruments know the texts there are")
        if unknown := sorted(map(str, given.keys() - cls.model_fields.keys() - OF_PLANS - {"new_texts"})):
            raise ValueError(f"no lever of a plan is called {unknown[0][:40]!r}")
        return given


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
    admit: Callable[[Sequence[Draft], int], None] = lambda drafts, tokens: None
    """Told of a call before anything is done for it: the drafts, and the tokens that each is to be measured on, 0 where
    none is; raises ValueError when what that takes is not to be had."""
    price: Callable[[Draft], str] = lambda draft: ""
    """What the trial of a draft takes, in words."""
    in_time: Callable[[], bool] = lambda: True
    """Whether seconds are left to begin another plan of a probe."""
    probed: list[Probed] = field(default_factory=list)
    """What was probed in the round so far; probes add to it."""
    past: Sequence[PastProbe] = ()
    """Probes of the run's earlier rounds, the latest: those of this one are numbered from there on."""
    book: Callable[[int, Sequence[WorkOrder]], None] = lambda tokens, orders: None
    """Told of a probe before it is made: the tokens that it measures on, all orders together, and the orders; raises
    ValueError when what that takes is not to be had."""


def inspect_layers(round_: Round, selector: str) -> Figures:
    """The whole profile of the layers that a selector means, of at most `MAX_INSPECTED` one by one.

    KL curves are in nats per token at `LEVELS`, `peak` as `LayerProfile` has it. Raises ImpossiblePlan when the
    selector means nothing.
    """
    layers = round_.bench.profiles.read(round_.profile).layers
    now = dict(zip(round_.bench.weights.by_name, round_.bench.weights.sparsities(), strict=True))
    names = set(select_layers(selector, layers))
    chosen = [layer for layer in layers if layer.name in names]
    total = sum(layer.weights for layer in chosen)
    curves = np.sum([layer.kappa for layer in chosen], axis=0)
    figures: Figures = {
        "layers": len(chosen),
        "weights": total,
        "sparsity_now": round_figure(sum(now[layer.name] * layer.weights for layer in chosen) / total),
        "kl_together": {f"{level:g}": round_figure(kl) for level, kl in zip(LEVELS, curves, strict=True)},
        "columns": f"name weights sparsity_now wanda_z grad_z peak {' '.join(f'kl{level:g}' for level in LEVELS)}",
        "rows": [_describe_layer(layer, now[layer.name]) for layer in chosen[:MAX_INSPECTED]],
    }
    return figures | ({"rows_left_out": len(chosen) - MAX_INSPECTED} if len(chosen) > MAX_INSPECTED else {})


def _describe_layer(layer: LayerProfile, sparsity: float) -> str:
    figures = [sparsity, layer.wanda_z, layer.gradient_z, layer.peak, *layer.kappa]
    shown = " ".join("?" if figure is None else f"{figure:.3g}" for figure in figures)
    return f"{layer.name} {layer.weights} {shown}"


def predict(round_: Round, draft: Draft) -> Figures:
    """What a draft's exact allocation comes to, by KL curves alone; nothing is pruned.

    `predicted_kl` is by the curves that the draft's recipe asks for, `mask_kl` by those of the profile; of layers that
    would be pruned `alone`, the sparsity of each, at most `MAX_INSPECTED`, and `predicted_kl` is theirs, as a probe's;
    all else, with what `trial_takes`, is of the whole plan.
    Curves of a method that nobody asked for before are measured first. Raises ImpossiblePlan, and ValueError as
    `Round.admit`.
    """
    round_.admit([draft], 0)
    order = round_.resolve(draft)
    layers = {layer.name: layer for layer in round_.bench.profiles.read(round_.profile).layers}
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
        "sparsity": round_figure(order.sparsity),
        "predicted_kl": round_figure(prune_alone(order, draft.alone, list(layers.values())).predicted_kl),
        "mask_kl": round_figure(mask_kl),
        **({"trial_takes": takes} if (takes := round_.price(draft)) else {}),
        "columns": "group: sparsity, share of mask_kl",
        "groups": {selector: [round_figure(share), round_figure(kl)] for selector, share, kl in rows[:MAX_TOLD_GROUPS]},
    }
    if draft.alone:
        names = select_layers(draft.alone, list(layers.values()))
        figures["alone"] = {name: round_figure(shares[name]) for name in names[:MAX_INSPECTED]}
    return figures | ({"groups_left_out": len(rows) - MAX_TOLD_GROUPS} if len(rows) > MAX_TOLD_GROUPS else {})


def predict_all(round_: Round, drafts: Sequence[Draft]) -> Figures:
    """Several drafts beside one another: the KL of each as `predict` tells it, and every group's sparsity by each, or
    once where it is the same by all.

    Of a draft that cannot be there is `error` alone, and null in the groups. Raises ImpossiblePlan when none can.
    """
    found = [_try(partial(predict, round_, draft)) for draft in drafts]
    plans: list[Figures] = [{"error": made} if isinstance(made, str) else made for made in found]
    _refuse_if_none(plans)
    shared = [figures.pop("groups", {}) for figures in plans]
    for figures in plans:
        figures.pop("columns", None)
    named = list(dict.fromkeys(selector for groups in shared for selector in groups))[:MAX_TOLD_GROUPS]
    rows = {name: [groups.get(name, [None])[0] for groups in shared] for name in named}
    alike = all(len(set(row)) == 1 for row in rows.values())
    return {
        "plans": plans,
        "columns": f"group: sparsity by {'all of them' if alike else 'each plan'}",
        "groups": {name: row[0] for name, row in rows.items()} if alike else rows,
    }


def predict_cut(round_: Round, draft: Draft) -> Figures:
    """What a draft of a run that takes whole parts away comes to, and its KL by the curves of the parts.

    Raises ImpossiblePlan.
    """
    order = round_.resolve(draft)
    assert order.cut is not None, "the run takes parts away"
    return {
        "sparsity": round_figure(order.sparsity),
        "predicted_kl": round_figure(order.predicted_kl),
        "heads": order.cut.heads,
        "neurons": order.cut.neurons,
        "blocks": list(order.cut.dropped),
    }


def _sum_kl(layers: Mapping[str, LayerProfile], shares: Mapping[str, float], names: Sequence[str]) -> float:
    return predict_kl([layers[name] for name in names], np.array([shares[name] for name in names]))


def probe(round_: Round, drafts: Sequence[Draft], tokens: int | None = None, *, whole: bool = False) -> list[Figures]:
    """Carry drafts out and measure each on `tokens` tokens of the validation text, rounded up to windows, on half of
    its windows, or on the `whole` text. Windows are spread over the text, and fewer are among those of more.

    Figures are paired with the dense model's on the same text, with those of the present weights where they are not
    the dense ones (`present_kl` is theirs on these windows, `kl_change` the draft's minus that), and with those of the
    other probes of the round, or the best of them (`MOST_DIFFERENCES`): `kl_minus_probe` is the draft's KL minus each,
    with its standard error, on the windows that both have; so are the best of earlier rounds. Changes and differences
    are told of each named text, too, and of several windows the KL of the worst. Of a draft that cannot be, or breaks
    while it is carried out, or is not begun because those before it took all the seconds, there is `error` alone. One
    that prunes some layers `alone` is compared with others of these layers.

    Raises ImpossiblePlan when none can, and ValueError when there are not the tokens or seconds for all that can.
    """
    bench = round_.bench
    windows = count_windows(bench, tokens, whole=whole)
    round_.admit(drafts, windows * bench.settings.window)
    found = [_try(partial(_resolve, round_, draft)) for draft in drafts]
    orders = {number: order for number, order in enumerate(found) if isinstance(order, WorkOrder)}
    if not orders:
        raise ImpossiblePlan("; ".join(dict.fromkeys(map(str, found))))
    figures: list[Figures] = [{"error": problem} for problem in found]
    places: dict[int, int] = {}
    known = find_known(round_.probed, windows * bench.settings.window)
    turns = sorted(orders, key=lambda number: orders[number].id not in known)  # those that are known take no time
    for first in range(0, len(turns), bench.crew.abreast):
        together = turns[first : first + bench.crew.abreast]
        if first and not round_.in_time():
            for number in turns[first:]:
                figures[number] = {"error": LATE}
            break
        probes = _probe_together(round_, [orders[number] for number in together], windows, known)
        for number, made in zip(together, probes, strict=True):
            if isinstance(made, str):
                figures[number] = {"error": made}
            else:
                figures[number] = _describe_probe(round_, orders[number], made.losses, windows)
                places[number] = remember_probe(round_.probed, _note(bench, orders[number], made, figures[number]))
    for number, place in places.items():
        compare_probes(round_.probed, round_.past, place, figures[number])
    _refuse_if_none(figures)
    return figures


def _probe_together(
    round_: Round, orders: Sequence[WorkOrder], windows: int, known: Collection[str]
) -> list[Probe | str]:
    """Book those of the orders that are not `known`, and carry all of them out at once."""
    bench = round_.bench
    fresh = [order for order in orders if order.id not in known]
    tokens = windows * bench.settings.window
    round_.book(sum(count_rest(round_.probed, order.id, tokens) for order in fresh), fresh)
    best, keep = find_best_whole(round_.probed), round_.keep
    progress, back = round_.progress, round_.present
    return probe_orders(bench, round_.profile, orders, windows, progress, back=back, keep=keep, best=best)


def count_windows(bench: Workbench, tokens: int | None, *, whole: bool) -> int:
    """Windows of validation text that hold so many tokens, half of them, or the whole; as many of each text."""
    every = len(bench.windows.validation)
    asked = bench.settings.half_tokens if tokens is None else tokens
    windows = every if whole else min(math.ceil(asked / bench.settings.window), every)
    return len(bench.losses.list_part("validation", windows))


def _note(bench: Workbench, order: WorkOrder, made: Probe, told: Figures) -> Probed:
    windows, losses = len(made.losses.kl), made.losses.model_dump()
    return Probed(
        order=order.id,
        checkpoint=made.checkpoint,
        sparsity=made.sparsity,
        tokens=windows * bench.settings.window,
        losses=losses,
        windows=bench.losses.list_part("validation", windows),
        line=order.line,
        predicted=told.get("predicted_kl"),
        change=told.get("kl_change"),
        change_error=told.get("kl_change_error"),
        texts={
            name: (text["kl_change"], text["kl_change_error"])
            for name, text in told.get("texts", {}).items()
            if "kl_change" in text
        },
        alone=order.alone,
    )


def _resolve(round_: Round, draft: Draft) -> WorkOrder:
    return prune_alone(round_.resolve(draft), draft.alone, round_.bench.profiles.read(round_.profile).layers)


def _try(work: Callable[[], Result]) -> Result | str:
    """What work on a draft comes to, or why it cannot be."""
    try:
        return work()
    except UserError:  # a full disk, say
        raise
    except ValueError as error:
        return str(error)


def _refuse_if_none(figures: Sequence[Figures]) -> None:
    """Raises ImpossiblePlan where no draft could be."""
    if all("error" in own for own in figures):
        raise ImpossiblePlan("; ".join(dict.fromkeys(own["error"] for own in figures)))


def _describe_probe(round_: Round, order: WorkOrder, evaluation: Evaluation, windows: int) -> Figures:
    bench = round_.bench
    dense = bench.losses.take_part(bench.profiles.read(round_.profile).dense, windows)
    figures: Figures = {
        "tokens": windows * bench.settings.window,
        "sparsity": round_figure(order.sparsity),
        "predicted_kl": round_figure(order.predicted_kl),
        "kl": round_figure(evaluation.mean_kl),
        "kl_error": round_figure(evaluation.kl_error),
        "perplexity": round_figure(evaluation.perplexity),
        "dense_perplexity": round_figure(dense.perplexity),
    }
    if windows > 1 and evaluation.finite:
        figures["worst_window_kl"] = round_figure(max(kl for kl in evaluation.kl if kl is not None))
    present: Evaluation | None = None
    if round_.present != DENSE and evaluation.finite and not order.alone:
        whole = bench.evaluator.evaluate(round_.present, "validation", round_.profile, round_.progress)
        present = bench.losses.take_part(whole, windows)
        figures["present_kl"] = round_figure(present.mean_kl)
        figures |= _round_change(*compare_kl(evaluation, present))
    if evaluation.texts:
        figures["texts"] = {text.name: _describe_text(text) for text in list_texts(evaluation, present)}
    return figures


def _describe_text(text: TextFigures) -> Figures:
    figures: Figures = {"kl": round_figure(text.kl), "kl_error": round_figure(text.kl_error)}
    return figures if text.change is None else figures | _round_change(text.change, text.change_error)


def _round_change(change: float, error: float | None) -> Figures:
    return {"kl_change": round_figure(change), "kl_change_error": round_figure(error)}
