"""Compare what was predicted with what was measured, and say in figures what that teaches."""

import math
from collections.abc import Sequence

from graph.agents.heuristic import group_kl, group_layers
from graph.state import SAME_SPARSITY, SIGMAS, Lesson, Trial
from tools.curves import LayerProfile
from tools.recipes import Recipe

MOST = 2.0
"""A lesson corrects a group's KL curves by at most this factor, up or down: one trial is thin evidence."""


def draw_lesson(
    run: str,
    layers: Sequence[LayerProfile],
    trial: Trial,
    sparsity: dict[str, float],
    before: Trial | None,
    before_sparsity: dict[str, float],
) -> Lesson | None:
    """What one trial teaches; None when it taught nothing (nothing finite, nothing predicted).

    Where weights moved at the same sparsity and recipe, the surprise goes to the group whose predicted KL moved most.
    Otherwise the lesson is about the model as a whole: how many times the predicted KL was measured.
    """
    recipe = trial.recipe
    if recipe is None or trial.kl is None or trial.predicted_kl <= 0 or trial.kl <= 0:
        return None
    if before is None or not _is_comparable(before, trial):
        return _lesson_of_whole(run, recipe, trial)
    groups = group_layers(layers)
    moved = {s: group_kl(g, sparsity) - group_kl(g, before_sparsity) for s, g in groups.items()}
    selector = max(moved, key=lambda s: abs(moved[s]))
    before_kl, before_predicted = before.kl or 0.0, group_kl(layers, before_sparsity)
    scale = before_kl / before_predicted if before_predicted > 0 else 1.0
    predicted, measured = scale * (group_kl(layers, sparsity) - before_predicted), trial.kl - before_kl
    holds = scale * group_kl(groups[selector], sparsity)
    if holds <= 0:
        return None
    # Pruning the group more and being hurt more than predicted means precious; pruning it less and gaining less
    # than predicted means the opposite.
    surprise = (measured - predicted) / holds * math.copysign(1.0, moved[selector])
    if trial.change_error is not None and abs(measured - predicted) <= SIGMAS * trial.change_error:
        surprise = 0.0
    factor = min(max(1 + surprise, 1 / MOST), MOST)
    direction = "more" if moved[selector] > 0 else "less"
    advice = f"count it {factor:.2f} times" if surprise else "as predicted, within the noise"
    return Lesson(
        run=run,
        iteration=trial.iteration,
        recipe=recipe.mask_label,
        selector=selector,
        factor=round(factor, 4),
        predicted=predicted,
        measured=measured,
        text=f"Pruning {selector} {direction} changed KL by {measured:+.4f} where {predicted:+.4f} was predicted: "
        f"{advice}.",
    )


def _is_comparable(before: Trial, trial: Trial) -> bool:
    """Whether the trial moved weights only: the same work inside each layer, the same sparsity."""
    if before.recipe is None or trial.recipe is None or not before.kl:
        return False
    same_work = before.recipe.mask_label == trial.recipe.mask_label
    return same_work and abs(before.sparsity - trial.sparsity) <= SAME_SPARSITY


def _lesson_of_whole(run: str, recipe: Recipe, trial: Trial) -> Lesson:
    assert trial.kl is not None
    factor = trial.kl / trial.predicted_kl
    return Lesson(
        run=run,
        iteration=trial.iteration,
        recipe=recipe.mask_label,
        selector="*",
        factor=round(factor, 4),
        predicted=trial.predicted_kl,
        measured=trial.kl,
        text=f"At {trial.sparsity:.1%} with {recipe.label} KL was {trial.kl:.4f}, {factor:.2f} times the predicted "
        f"{trial.predicted_kl:.4f}.",
    )
