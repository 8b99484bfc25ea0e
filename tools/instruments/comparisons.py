"""Probes beside one another and beside trials: paired differences, in a round and from one to the next."""

import math
from collections.abc import Sequence
from typing import Any

from tools.instruments.probed import PastProbe, Probed, count_probes
from tools.results.losses import Evaluation, compare_kl
from tools.workbench.evaluate import Probe, find_best, rank_probe

MOST_DIFFERENCES = 24
"""Paired differences that each probe is told with, those of every text counted: four have room in one answer."""
MOST_EARLIER = 4
"""Earlier rounds whose best probes are among these, the latest, and at most half of them."""

Figures = dict[str, Any]


def compare_probes(probed: Sequence[Probed], past: Sequence[PastProbe], own: int, told: Figures) -> None:
    """Add to what is told of the probe in this place of the round's its number, counted on from `past` ones, and its KL
    minus that of others of the round, and of the best of earlier ones, that pruned the same layers; on each named
    text, too: [mean, standard error], paired."""
    first = count_probes(past) + 1
    told["probe"] = first + own
    mine, most = probed[own], MOST_DIFFERENCES // (1 + len(told.get("texts", {})))
    earlier = [] if mine.alone else [probe for probe in past if probe.losses is not None]
    earlier = earlier[max(len(earlier) - min(MOST_EARLIER, most // 2), 0) :]
    others = {probe.number: (probe.windows, Evaluation.model_validate(probe.losses)) for probe in earlier}
    for place in _list_best(probed, own, most - len(earlier)):
        others[first + place] = probed[place].windows, read_losses(probed[place])
    for number, (windows, losses) in others.items():
        ours, theirs = _pair((mine.windows, read_losses(mine)), (windows, losses))
        if not (ours.kl and ours.finite and theirs.finite):
            continue
        texts = [(whose, ours.take_text(x), theirs.take_text(x)) for x, whose in told.get("texts", {}).items()]
        for whose, here, there in [(told, ours, theirs), *texts]:
            beside = whose.setdefault("kl_minus_probe", {})
            beside[f"{number}"] = [round_figure(figure) for figure in compare_kl(here, there)]


def find_best_whole(probed: Sequence[Probed]) -> Probe | None:
    """The best probe of a round of those that pruned all layers, and whose checkpoint is known."""
    return find_best(_try(x) for x in probed if x.checkpoint and not x.alone)


def _list_best(probed: Sequence[Probed], own: int, most: int) -> list[int]:
    """The places of so many probes of a round beside one's own, of the same layers, the best ones, in order."""
    alike = [place for place, x in enumerate(probed) if place != own and x.alone == probed[own].alone]
    return sorted(sorted(alike, key=lambda place: rank_probe(_try(probed[place])))[:most])


def sum_up_probes(probed: Sequence[Probed], iteration: int, before: int) -> list[PastProbe]:
    """What the probes of a round measured, for later rounds; so many there were `before` it."""
    best = {alone: _find_best_of(probed, alone) for alone in {x.alone for x in probed}}
    return [
        PastProbe(
            number=number,
            iteration=iteration,
            plan=x.line,
            tokens=x.tokens,
            kl=round_figure((losses := read_losses(x)).mean_kl),
            kl_error=round_figure(losses.kl_error),
            predicted=x.predicted,
            change=x.change,
            change_error=x.change_error,
            texts=x.texts,
            **_compare_with_best(x, probed[best[x.alone]], before + best[x.alone] + 1),
            **({"windows": x.windows, "losses": x.losses} if not x.alone and x is probed[best[""]] else {}),
        )
        for number, x in enumerate(probed, before + 1)
        if x.line
    ]


def _find_best_of(probed: Sequence[Probed], alone: str) -> int:
    """The place of the best probe of these layers."""
    places = [place for place, x in enumerate(probed) if x.alone == alone]
    return min(places, key=lambda place: rank_probe(_try(probed[place])))


def _compare_with_best(probed: Probed, best: Probed, number: int) -> Figures:
    """How a probe differs from the best of its round, which has this number; nothing of that one itself."""
    ours, theirs = _pair(*((x.windows, read_losses(x)) for x in (probed, best)))
    if probed is best or not (ours.kl and ours.finite and theirs.finite):
        return {}
    change, error = compare_kl(ours, theirs)
    return {"best": number, "behind": round_figure(change), "behind_error": round_figure(error)}


def compare_with_trial(past: Sequence[PastProbe], iteration: int, trial: Evaluation) -> list[PastProbe]:
    """The same probes; the best of the round beside the round's trial.

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
        told.append(probe.model_copy(update=beside))
    return told


def read_losses(probed: Probed) -> Evaluation:
    """The losses of a probe."""
    return Evaluation.model_validate(probed.losses)


def _try(probed: Probed) -> Probe:
    return Probe(probed.checkpoint, probed.sparsity, read_losses(probed))


def _pair(
    one: tuple[Sequence[int], Evaluation], other: tuple[Sequence[int], Evaluation]
) -> tuple[Evaluation, Evaluation]:
    """The losses of two probes, each given with its windows, on the windows that both have."""
    shared = [window for window in one[0] if window in other[0]]
    ours, theirs = (losses.take([windows.index(window) for window in shared]) for windows, losses in (one, other))
    return ours, theirs


def round_figure(value: float | None) -> float | None:
    """Four significant digits; None for what is not finite, as JSON has no word for it."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
