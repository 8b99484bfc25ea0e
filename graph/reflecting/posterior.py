"""Lessons as figures: what several of them say together, and what that makes of the KL curves.

Where two lessons are about the same layers and recipe, they are one: the mean of their factors' logs, weighted by
evidence (observations times confidence), with the observations of both. A lesson that a new one contradicts, above 1
where the other is below and both by more than `LEAST`, loses half of its confidence, and below `FORGET` it is dropped.
What a trial says that moved weights stays by itself, for at planning time one regression goes over all of them.

At planning time the lessons about one group of layers are merged once more, that regression's among them, and the
factor is shrunk towards 1 as if `PRIOR` further observations had found the KL curves right. All factors refer to the
KL curves as measured, never to curves that lessons corrected before, so that a correction does not feed on itself.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from graph.reflecting.schema import MOST, Lesson
from graph.state import SIGMAS
from tools.base.errors import ImpossiblePlan
from tools.plans.groups import Group, name_work
from tools.plans.layer_profile import LayerProfile, select_layers
from tools.plans.recipe import Recipe

SPREAD = 0.5
"""How far off the curves of a group are thought to be, before anything is measured: a standard deviation of factors."""

MOSTLY = 0.6
"""A trial is about one group where that has this share of the sum of squares of the changes that were predicted."""

HEARD = MOSTLY / 2
"""Groups of which less than this share of the variance is explained get no factor. One trial explains half of its
mover's where nothing else moved and nothing was noisy."""


class Blame(NamedTuple):
    """What trials say of a group."""

    factor: float
    """Without the shrinkage that `evidence` stands for."""
    evidence: float
    """How many trials of this group alone, without noise, would say as much."""


def find_mover(moved: dict[str, float]) -> str | None:
    """The group that all but moved alone; None where there is none."""
    total = sum(change**2 for change in moved.values())
    selector = max(moved, key=lambda group: abs(moved[group]), default=None)
    return selector if selector is not None and moved[selector] ** 2 >= MOSTLY * total > 0 else None


def _find_surprise(trial: Lesson) -> float:
    """What was measured less what was predicted, nats per token; 0 inside the noise."""
    surprise = (trial.measured or 0.0) - trial.predicted
    return surprise if abs(surprise) > SIGMAS * (trial.error or 0.0) else 0.0


def fit_factors(trials: Sequence[tuple[Lesson, float]]) -> dict[str, Blame]:
    """What trials, each with its weight, say of the groups that they moved; only of those that are `HEARD`.

    A trial of weight 1/2 counts half of one of weight 1. One without a known error counts half, too.
    """
    groups = sorted({group for trial, _ in trials for group in trial.moved})
    rows = [[trial.moved.get(group, 0.0) for group in groups] for trial, _ in trials]
    moved_TG = SPREAD * np.array(rows).reshape(len(trials), len(groups))
    surprise_T = np.array([_find_surprise(trial) for trial, _ in trials])
    known_T = np.array([weight * (0.5 if trial.error is None else 1.0) for trial, weight in trials])
    error_T = np.array([trial.error or 0.0 for trial, _ in trials])
    noise_T = np.sqrt((moved_TG**2).sum(axis=1) / known_T + error_T**2)
    design_TG = moved_TG / noise_T[:, None]
    solved_TG = np.linalg.solve(np.eye(len(trials)) + design_TG @ design_TG.T, design_TG)  # trials are few, groups many
    mean_G = SPREAD * (surprise_T / noise_T) @ solved_TG
    explained_G = (design_TG * solved_TG).sum(axis=0)
    return {
        group: Blame(factor=float(1 + mean / explained), evidence=float(explained / (1 - explained)))
        for group, mean, explained in zip(groups, mean_G, explained_G, strict=True)
        if explained >= HEARD
    }


WHOLE = "*"
"""The selector of a lesson about the model as a whole: a calibration of the predicted KL, no matter for allocation."""

LEAST = 1.05
"""Factors nearer to 1 than this say nothing."""

PRIOR = 1.0
"""Observations that the KL curves are right, which a group's lessons are weighed against."""

TRANSFER = 0.5
"""Weight of a lesson for another recipe, or for other curves, than those that it was learnt with."""

DEMOTION = 0.5
"""What is left of a lesson's confidence when it is contradicted."""

FORGET = 0.25
"""Merged lessons of less confidence are dropped."""

CARRIED = 40
"""Lessons that a run carries in its state, those last confirmed."""


def find_curves(recipe: Recipe) -> str:
    """Which KL curves the recipe's allocation reads, as lessons name them."""
    return "method" if recipe.needs_curves else "mask"


def weigh_evidence(lesson: Lesson) -> float:
    """How many observations of full confidence a lesson is worth."""
    return lesson.count * lesson.confidence


def name_subject(lesson: Lesson) -> tuple[object, ...]:
    """What a lesson is about: those about the same are merged. A repeat's and mere words stay apart from the rest, and
    so does each trial that moved weights."""
    if lesson.moved:
        return lesson.run, lesson.iteration, lesson.same_config
    sparsity = None if lesson.sparsity is None else round(lesson.sparsity, 2)
    ground = lesson.calibration, lesson.pattern, sparsity
    return lesson.selector, lesson.recipe, lesson.curves, *ground, lesson.same_config, lesson.confidence > 0


def merge_lessons(lessons: Iterable[Lesson]) -> list[Lesson]:
    """The lessons, oldest first, with those about the same as one, in the order of their last observation."""
    merged: dict[tuple[object, ...], Lesson] = {}
    for lesson in lessons:
        key = name_subject(lesson)
        old = merged.pop(key, None)
        merged[key] = _merge_two(old, lesson) if old and not lesson.moved else lesson
    return [lesson for lesson in merged.values() if lesson.count == 1 or not 0 < lesson.confidence < FORGET]


def _merge_two(old: Lesson, new: Lesson) -> Lesson:
    weights = weigh_evidence(old), weigh_evidence(new)
    total, count = sum(weights), old.count + new.count
    if not total:
        return new
    logs = math.log(old.factor), math.log(new.factor)
    confidence = total / count
    if new.selector != WHOLE and logs[0] * logs[1] < 0 and min(map(abs, logs)) > math.log(LEAST):
        confidence *= DEMOTION
    factor = math.exp((weights[0] * logs[0] + weights[1] * logs[1]) / total)
    measured = "measured" if "measured" in (old.source, new.source) else "reflector"
    return new.model_copy(
        update={"factor": round(factor, 4), "confidence": round(confidence, 4), "count": count, "source": measured}
    )


class Factor(NamedTuple):
    """What lessons make of the KL curves of a group."""

    factor: float
    """Between 1/MOST and MOST."""
    error: float
    """Its standard deviation, where curves are off by SPREAD before anything is observed."""


def find_factors(
    lessons: Iterable[Lesson],
    layers: Sequence[LayerProfile],
    recipe: Recipe,
    sparsity: float,
    calibration: str,
    groups: Sequence[Group] = (),
) -> dict[str, Factor]:
    """Selectors to the factors that lessons put on the KL curves of a plan's recipes.

    Left out are lessons of a run of the same trials, those that were learnt on another text or pattern than the plan's
    or far from its sparsity, those about the whole model or no layer of it, and factors within LEAST of 1.
    """
    trials: list[tuple[Lesson, float]] = []
    said: list[Lesson] = []
    work = name_work(recipe, groups), find_curves(recipe)
    for lesson in lessons:
        if lesson.same_config or not lesson.confidence or not lesson.fits(calibration, recipe.pattern, sparsity):
            continue
        weight = 1.0 if (lesson.recipe, lesson.curves) == work else TRANSFER
        if lesson.moved:
            trials.append((lesson, weight))
        else:
            said.append(lesson.model_copy(update={"confidence": weight * lesson.confidence}))
    said += [_make_lesson(selector, blame) for selector, blame in fit_factors(trials).items()]
    merged: dict[str, Lesson] = {}
    for lesson in said:
        if _is_group(lesson.selector, layers):
            old = merged.get(lesson.selector)
            merged[lesson.selector] = _merge_two(old, lesson) if old else lesson
    shrunk = {selector: _shrink(lesson) for selector, lesson in sorted(merged.items())}
    return {selector: shrink for selector, shrink in shrunk.items() if abs(math.log(shrink.factor)) > math.log(LEAST)}


def _make_lesson(selector: str, blame: Blame) -> Lesson:
    """What all trials say of a group, as if so many had been about it alone."""
    factor, count = min(max(blame.factor, 1 / MOST), MOST), max(1, math.ceil(blame.evidence))
    told = {"factor": factor, "count": count, "confidence": blame.evidence / count}
    return Lesson(run="", iteration=0, selector=selector, predicted=0.0, measured=None, text="", **told)


def _is_group(selector: str, layers: Sequence[LayerProfile]) -> bool:
    try:
        return len(select_layers(selector, layers)) < len(layers)
    except ImpossiblePlan:
        return False


def _shrink(lesson: Lesson) -> Factor:
    evidence = weigh_evidence(lesson)
    factor = math.exp(math.log(lesson.factor) * evidence / (evidence + PRIOR))
    error = SPREAD * math.sqrt(PRIOR / (evidence + PRIOR))
    return Factor(round(min(max(factor, 1 / MOST), MOST), 3), error)


def weigh_layers(layers: Sequence[LayerProfile], multipliers: dict[str, float]) -> list[LayerProfile]:
    """The layers with their KL curves multiplied; of several selectors, the one that names fewest layers counts.

    Raises ImpossiblePlan when a selector names no layer.
    """
    named = [(select_layers(selector, layers), factor) for selector, factor in multipliers.items()]
    factors = {name: factor for names, factor in sorted(named, key=lambda x: -len(x[0])) for name in names}
    return [
        layer.model_copy(update={"kappa": [factors[layer.name] * k for k in layer.kappa]})
        if layer.name in factors
        else layer
        for layer in layers
    ]


def tidy_selector(selector: str, layers: Sequence[LayerProfile]) -> str:
    """The same layers in one way of writing, where there is one, so that lessons about them meet.

    `*`, a kind such as `mlp.down_proj`, `blocks 0-3 · mlp.down_proj` or `blocks 0-3`; the selector without needless
    spaces where none of these names the same layers. Raises ImpossiblePlan when it names no layer.
    """
    names = select_layers(selector, layers)
    chosen = [layer for layer in layers if layer.name in set(names)]
    span = f"blocks {min(layer.block for layer in chosen)}-{max(layer.block for layer in chosen)}"
    kinds = {layer.kind for layer in chosen}
    forms = [WHOLE, span]
    if len(kinds) == 1:
        kind = kinds.pop()
        forms += [kind, f"{span} · {kind}"]
    return next((form for form in forms if _names(form, layers) == names), " ".join(selector.split()))


def _names(selector: str, layers: Sequence[LayerProfile]) -> list[str]:
    try:
        return select_layers(selector, layers)
    except ImpossiblePlan:
        return []
