"""Plans as a planner would write them: without what is as it is when left out."""

import json
from typing import Any

from graph.planning.plan import Plan
from tools.base.words import spare_brackets
from tools.plans.recipe import Recipe
from tools.results.trial import Trial

LEVERS = {"groups", "adjustments", "cut"}
"""What a plan, and its trial, says beside sparsity and recipe."""


def spell_out_plan(plan: Plan) -> dict[str, Any]:
    """A plan as a planner would write it, and its reason, if it has one; a cut has no recipe, and texts that were
    written for it are there."""
    return _spell_out(plan.sparsity, plan.recipe, plan) | ({"reason": plan.reason} if plan.reason else {})


def spell_out_trial(trial: Trial) -> dict[str, Any]:
    """What a trial's plan asked for, as `spell_out_plan`."""
    return _spell_out(trial.sparsity, trial.recipe, trial)


def write_plan(told: dict[str, Any]) -> str:
    """What was spelt out as JSON in one line, fit for a block of data."""
    return spare_brackets(json.dumps(told, ensure_ascii=True, separators=(",", ":")))


def _spell_out(sparsity: float, recipe: Recipe | None, of: Plan | Trial) -> dict[str, Any]:
    others = of.model_dump(include=LEVERS, exclude_defaults=True)
    told: dict[str, Any] = {"sparsity": float(f"{sparsity:.4g}")}
    if recipe is not None and "cut" not in others:
        told["recipe"] = _spell_recipe(recipe)
    return told | others


def _spell_recipe(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that are not as they are when left out, and its method."""
    told = recipe.model_dump(exclude_defaults=True, exclude={"pattern", "statistics"})
    own = Recipe(method=recipe.method).statistics
    return {"method": recipe.method, **told, **({} if recipe.statistics == own else {"statistics": recipe.statistics})}
