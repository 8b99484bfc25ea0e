"""What a plan does otherwise than the one it is compared with, and what that did to KL."""

from typing import Any

from graph.planning.orders import drop_lessons
from graph.reflecting.schema import Tried
from tools.base.words import shorten
from tools.plans.budget import same_sparsity
from tools.plans.recipe import Recipe
from tools.results.trial import Trial

MOST = 160
"""Characters that name levers."""


def note_tried(run: str, trial: Trial, before: Trial | None, pattern: str) -> Tried | None:
    """What the trial's levers did, beside the last kept one; None where that had another sparsity or nothing paired."""
    if before is None or not before.kl or trial.kl is None or trial.change_error is None:
        return None
    levers = name_levers(trial, before)
    if not levers or not same_sparsity(trial.sparsity, before.sparsity):
        return None
    return Tried(
        run=run,
        iteration=trial.iteration,
        levers=levers,
        sparsity=trial.sparsity,
        pattern=pattern,
        change=trial.kl / before.kl - 1,
        error=trial.change_error / before.kl,
    )


def name_levers(trial: Trial, before: Trial) -> str:
    """Such as `refit: gamma clipped for plain, with *.v_proj x2`: the method, and what is not as it was before.

    Empty where nothing is, or the recipes are not known.
    """
    if trial.recipe is None or before.recipe is None:
        return ""
    ours, theirs = _list_values(trial.recipe), _list_values(before.recipe)
    changed = [f"{name} {value} for {theirs[name]}" for name, value in ours.items() if value != theirs[name]]
    rest, former = _find_rest(trial, trial.recipe), _find_rest(before, before.recipe)
    if rest != former:
        changed += [f"{word} {part}" for word, part in (("with", rest), ("without", former)) if part]
    if not changed and trial.plan != before.plan:
        changed = ["other factors of lessons"]
    return shorten(f"{trial.recipe.method}: {', '.join(changed)}", MOST) if changed else ""


def _list_values(recipe: Recipe) -> dict[str, str]:
    """What each field comes to, in words; the user's pattern is no lever."""
    values: dict[str, Any] = {name: getattr(recipe, name) for name in Recipe.model_fields if name != "pattern"}
    values |= {"refit": recipe.refits, "refit_steps": recipe.steps}
    values |= {"damping": recipe.fit_damping, "mix": dict(recipe.mix)}
    return {name: _show(value) for name, value in values.items()}


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{share:g} {name}" for name, share in value.items()) or "as in the run"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _find_rest(trial: Trial, recipe: Recipe) -> str:
    """What a plan's line says behind its recipe, lessons aside: groups of layers, adjustments."""
    return drop_lessons(trial.plan).partition(recipe.label)[2].strip(" ·")
