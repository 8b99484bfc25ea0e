"""Which groups are to blame for what trials measured: one ridge regression over all trials together.

A trial that moves weights from group to group changes KL by more, or less, than the KL curves say. Where one group
alone moved much, that says something of its curves; where many did, it says little of any, until other trials tell
them apart. With y the change that was measured less the one predicted, m the changes that were predicted of the
groups, and f their factors,

    y = sum over groups of (f - 1) m + noise,    f ~ N(1, SPREAD^2),    noise ~ N(0, SPREAD^2 |m|^2 + error^2),

where `error` is the standard error of the measurement, and the other part is for what no factor explains: a trial of
one group without an error counts as much as the curves do. A surprise inside the noise (`SIGMAS`) counts as none.

Shape suffixes: T trials, G groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from graph.reflecting.schema import Lesson
from graph.state import SIGMAS

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
