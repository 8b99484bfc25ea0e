"""What a planner may find out before it commits itself to a plan: plain functions that answer in figures.

Each leaves the weights in the model as it found them, bit for bit.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from tools.base.errors import ImpossiblePlan, UserError
from tools.base.progress import Progress
from tools.instruments.probed import PastProbe, Probed, find_known, remember_probe
from tools.measure.losses import Evaluation, compare_kl
from tools.measure.texts import list_texts
from tools.plans.cuts import Cutting
from tools.plans.expression import Expression
from tools.plans.graft import Graft
from tools.plans.groups import MAX_GROUPS as MOST_GROUPS
from tools.plans.groups import Group
from tools.plans.layer_profile import LEVELS, LayerProfile, predict_kl
from tools.plans.recipe import MAX_ADJUSTMENTS, Adjustment, Recipe
from tools.plans.selectors import select_layers
from tools.plans.work_order import WorkOrder
from tools.results.schema import TextFigures
from tools.workbench.bench import Workbench
from tools.workbench.probes import Probe, find_best, rank_probe
from tools.workbench.store import DENSE

MAX_INSPECTED = 24
"""Layers that one look shows one by one."""
MAX_GROUPS = 48
"""Groups of layers whose shares a prediction names."""
MOST_DIFFERENCES = 24
"""Paired differences that each probe is told with, those of every text counted: four have room in one answer."""

Figures = dict[str, Any]


class Draft(BaseModel):
    """A plan as far as instruments need it; whatever else a plan has is left out of account."""

    sparsity: float = Field(gt=0, lt=1, description="Share of all prunable weights to be zero, as a fraction.")
    recipe: Recipe = Field(default_factory=Recipe, description="How weights are chosen and shared out.")
    groups: list[Group] = Field(
        default_factory=list,
        max_length=MOST_GROUPS,
        exclude_if=operator.not_,
        description="Other recipes for some layers.",
    )
    adjustments: list[Adjustment] = Field(
        default_factory=list, max_length=MAX_ADJUSTMENTS, description="Corrections for groups of layers."
    )
    expression: Expression = Field("", description="A formula that gives every layer a factor on its KL curve.")
    graft: Graft | None = Field(
        None, exclude_if=lambda graft: graft is None, description="Layers of two rounds, of which nothing is pruned."
    )
    cut: Cutting | None = Field(
        None, exclude_if=lambda cut: cut is None, description="How it is shared out, where whole parts go."
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
    admit: Callable[[Sequence[Draft], int, int], None] = lambda drafts, tokens, others: None
    """Told of a call before anything is done for it: the drafts, the tokens that each is to be measured on, 0 where
    none is, and those of other measurements; raises ValueError when what that takes is not to be had."""
    probed: list[Probed] = field(default_factory=list)
    """What was probed in the round so far; probes add to it."""
    probes_before: int = 0
    """Probes of the run's earlier rounds: those of this one are numbered from there on."""
    list_at_hand: Callable[[], Mapping[int, str]] = dict
    """The checkpoints of rounds whose layers are on disk, by their numbers."""
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
        "sparsity_now": round_figure(sum(now[layer.name] * layer.weights for layer in chosen) / total),
        "kl_together": {f"{level:g}": round_figure(kl) for level, kl in zip(LEVELS, curves, strict=True)},
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
    method that nobody asked for before are measured first. Raises ImpossiblePlan, and ValueError as `Round.admit`.
    """
    round_.admit([draft], 0, 0)
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
        "sparsity": round_figure(order.sparsity),
        "predicted_kl": round_figure(order.predicted_kl),
        "mask_kl": round_figure(mask_kl),
        "columns": "group: sparsity, share of mask_kl",
        "groups": {selector: [round_figure(share), round_figure(kl)] for selector, share, kl in rows[:MAX_GROUPS]},
    }
    return figures | ({"groups_left_out": len(rows) - MAX_GROUPS} if len(rows) > MAX_GROUPS else {})


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
    with its standard error, on the windows that both have. Changes and differences are told of each named text, too. Of
    a draft that cannot be, or breaks while it is carried out, there is `error` alone. Raises ImpossiblePlan when none
    can, and ValueError when there are not the tokens or seconds for all that can.
    """
    bench = round_.bench
    windows = count_windows(bench, tokens, whole=whole)
    round_.admit(drafts, windows * bench.settings.window, 0)
    found = [_try_to_resolve(round_, draft) for draft in drafts]
    orders = {number: order for number, order in enumerate(found) if isinstance(order, WorkOrder)}
    if not orders:
        raise ImpossiblePlan("; ".join(dict.fromkeys(map(str, found))))
    known = find_known(round_.probed, windows * bench.settings.window)
    fresh = [order for order in orders.values() if order.id not in known]
    round_.book(len(fresh) * windows * bench.settings.window, fresh)
    probes = bench.probe(
        round_.profile,
        list(orders.values()),
        windows,
        round_.progress,
        back=round_.present,
        keep=round_.keep,
        best=find_best(x for x in _list_tried(round_.probed) if x.checkpoint),
    )
    figures: list[Figures] = [{"error": problem} for problem in found]
    places: dict[int, int] = {}
    for (number, order), made in zip(orders.items(), probes, strict=True):
        if isinstance(made, str):
            figures[number] = {"error": made}
        else:
            figures[number] = _describe_probe(round_, order, made.losses, windows)
            places[number] = remember_probe(round_.probed, _note(bench, order, made, figures[number]))
    for number, place in places.items():
        _compare_probes(round_, place, figures[number])
    if all("error" in figure for figure in figures):
        raise ImpossiblePlan("; ".join(dict.fromkeys(figure["error"] for figure in figures)))
    return figures


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
        change=told.get("kl_change"),
        change_error=told.get("kl_change_error"),
        texts={
            name: (text["kl_change"], text["kl_change_error"])
            for name, text in told.get("texts", {}).items()
            if "kl_change" in text
        },
        grafted=order.grafted,
    )


def sum_up_probes(probed: Sequence[Probed], iteration: int, before: int) -> list[PastProbe]:
    """What the probes of a round measured, for later rounds; so many there were `before` it."""
    tried = _list_tried(probed)
    best = min(range(len(tried)), key=lambda place: rank_probe(tried[place]), default=0)
    return [
        PastProbe(
            number=number,
            iteration=iteration,
            plan=x.line,
            tokens=x.tokens,
            kl=round_figure((losses := _read_losses(x)).mean_kl),
            kl_error=round_figure(losses.kl_error),
            change=x.change,
            change_error=x.change_error,
            texts=x.texts,
            **_compare_with_best(x, probed[best], before + best + 1),
            **({"windows": x.windows, "losses": x.losses} if x is probed[best] else {}),
        )
        for number, x in enumerate(probed, before + 1)
        if x.line
    ]


def compare_with_trial(past: Sequence[PastProbe], iteration: int, trial: Evaluation) -> list[PastProbe]:
    """The same probes; the best of the round, whose losses were kept for that, beside the round's trial.

    Nothing is told of it where the trial is what it probed, or one of the two was not finite.
    """
    told = []
    for probe in past:
        beside: Figures = {}
        if probe.losses is not None and probe.iteration == iteration:
            theirs, ours = Evaluation.model_validate(probe.losses), trial.take(probe.windows)
            change, error = compare_kl(ours, theirs) if ours.finite and theirs.finite else (0.0, 0.0)
            if change or error:
                beside = {"trial": round_figure(change), "trial_error": round_figure(error)}
        told.append(probe.model_copy(update={"windows": [], "losses": None, **beside}))
    return told


def _compare_with_best(probed: Probed, best: Probed, number: int) -> Figures:
    """How a probe differs from the best of its round, which has this number; nothing of that one itself."""
    ours, theirs = _pair(probed, best)
    if probed is best or not (ours.kl and ours.finite and theirs.finite):
        return {}
    change, error = compare_kl(ours, theirs)
    return {"best": number, "behind": round_figure(change), "behind_error": round_figure(error)}


def read_probed(round_: Round, number: int) -> Evaluation:
    """The losses of the round's probe of this number."""
    return _read_losses(round_.probed[number - round_.probes_before - 1])


def _read_losses(probed: Probed) -> Evaluation:
    return Evaluation.model_validate(probed.losses)


def _compare_probes(round_: Round, own: int, told: Figures) -> None:
    """Add to what is told of the probe in this place its number, and its KL minus that of others of the round, on each
    named text, too: [mean, standard error], paired."""
    first = round_.probes_before + 1
    told["probe"] = first + own
    for place in _list_best(round_.probed, own, MOST_DIFFERENCES // (1 + len(told.get("texts", {})))):
        ours, theirs = _pair(round_.probed[own], round_.probed[place])
        if not (ours.kl and ours.finite and theirs.finite):
            continue
        for whose, losses, others in list_pairs(told, ours, theirs):
            beside = whose.setdefault("kl_minus_probe", {})
            beside[f"{first + place}"] = [round_figure(figure) for figure in compare_kl(losses, others)]


def list_pairs(told: Figures, ours: Evaluation, theirs: Evaluation) -> list[tuple[Figures, Evaluation, Evaluation]]:
    """(where it is told, the losses of a probe, another's) of all windows that both have, and of those of each text."""
    texts = [(whose, ours.take_text(name), theirs.take_text(name)) for name, whose in told.get("texts", {}).items()]
    return [(told, ours, theirs), *texts]


def _list_best(probed: Sequence[Probed], own: int, most: int) -> list[int]:
    """The places of so many probes of a round beside one's own, the best ones, in order."""
    tried = _list_tried(probed)
    others = [place for place in range(len(tried)) if place != own]
    return sorted(sorted(others, key=lambda place: rank_probe(tried[place]))[:most])


def _list_tried(probed: Sequence[Probed]) -> list[Probe]:
    return [Probe(x.checkpoint, x.sparsity, _read_losses(x)) for x in probed]


def _pair(one: Probed, other: Probed) -> tuple[Evaluation, Evaluation]:
    """The losses of two probes on the windows that both have."""
    shared = [window for window in one.windows if window in other.windows]
    ours, theirs = (_read_losses(x).take([x.windows.index(window) for window in shared]) for x in (one, other))
    return ours, theirs


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
    dense = take_part(bench, bench.read_profile(round_.profile).dense, windows)
    figures: Figures = {
        "tokens": windows * bench.settings.window,
        "sparsity": round_figure(order.sparsity),
        "predicted_kl": round_figure(order.predicted_kl),
        "kl": round_figure(evaluation.mean_kl),
        "kl_error": round_figure(evaluation.kl_error),
        "perplexity": round_figure(evaluation.perplexity),
        "dense_perplexity": round_figure(dense.perplexity),
    }
    present: Evaluation | None = None
    if round_.present != DENSE and evaluation.finite:
        whole = bench.evaluate(round_.present, "validation", round_.profile, round_.progress)
        present = take_part(bench, whole, windows)
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


def take_part(bench: "Workbench", evaluation: Evaluation, windows: int) -> Evaluation:
    """Of losses on a part of the validation text, or on all of it, those that a probe of fewer windows has, too."""
    places = bench.losses.list_part("validation", len(evaluation.kl))
    return evaluation.take([places.index(window) for window in bench.losses.list_part("validation", windows)])


def round_figure(value: float | None) -> float | None:
    """Four significant digits; None for what is not finite, as JSON has no word for it."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
