"""By which recipe each layer of a plan is pruned, and the layers as the plan's allocation reads them."""

from collections.abc import Callable, Sequence
from typing import Any

from graph.config import RunConfig
from graph.goals.schema import (
    NewText,
    check_followed,
    check_prompts,
    count_allowed,
    count_new_text,
    follow_new_texts,
)
from graph.planning.plan import Plan
from graph.state import State
from tools.base.errors import ImpossiblePlan
from tools.base.settings import RUN
from tools.base.words import count
from tools.plans.costs import count_gradients
from tools.plans.groups import Group, assign_groups
from tools.plans.layer_profile import LayerProfile
from tools.plans.mix import read_mix
from tools.plans.recipe import Recipe


def count_left(state: State) -> int:
    """How many texts plans may still have the model write."""
    written = len(state.written) + (len(state.brief.new_texts) if state.brief else 0)
    return max(count_allowed(state.config) - written, 0)


def check_new_texts(plan: Plan, config: RunConfig, left: int) -> None:
    """Raises ValueError, in words for who made the plan, where its new texts cannot be written."""
    new = plan.new_texts
    if not new:
        return
    if len(new) > left:
        raise ValueError(
            f"new_texts are {count(len(new), 'text')} of {count_new_text(config):,} tokens each, and the model may "
            f"write {left} more (goal_tokens)"
        )
    names = [*config.text, *(text.name for text in new)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"new_texts name {twice!r}, and there is such a text already; choose another name")
    if any(group.recipe.mix for group in plan.groups):
        raise ValueError("new_texts count in the plan's own mix; leave mix out of groups")
    check_prompts(new)
    check_followed(follow_new_texts(config, new))


def list_unwritten(plan: Plan, config: RunConfig) -> list[NewText]:
    """Those of a plan's texts that the run has not yet."""
    return [NewText(name=text.name, prompts=text.prompts) for text in plan.new_texts if text.name not in config.text]


def count_new_tokens(config: RunConfig, new: int, *, accepted: bool) -> int:
    """Tokens through the model where so many texts come into a run: what layers read of them, gradients and curves of
    all texts, and on validation text the dense weights and those that were accepted once more."""
    if not new:
        return 0
    texts, known = len(config.text) + new, len(config.text)
    gradients = count_gradients(config) * texts // known
    validation = config.validation_tokens * texts // known
    return new * config.calibration_windows * config.window + 6 * gradients + (1 + accepted) * validation


def fit_to_new_texts(plan: Plan, config: RunConfig) -> Plan:
    """The plan with its new texts in its mix: beside what that says, or what the run's texts count."""
    if not plan.new_texts:
        return plan
    mix = dict(plan.recipe.mix) or {name: share for name, share in config.text_shares.items() if share}
    mix |= {text.name: text.weight for text in plan.new_texts}
    recipe: dict[str, Any] = {**plan.recipe.model_dump(), "mix": mix}
    return plan.model_copy(update={"recipe": type(plan.recipe).model_validate(recipe)})


Layers = Sequence[LayerProfile]
Read = Callable[[Recipe], Layers]
"""Gives the layers with the KL curves that a recipe's allocation asks for, or such as are known."""


def find_recipe(plan: Plan, config: RunConfig) -> Recipe:
    """The plan's recipe with the user's pattern, whatever the plan says of one; a mixture that is the run's is none."""
    return _take_runs_mix(plan.recipe.model_copy(update={"pattern": config.pattern}), config)


def list_recipes(plan: Plan, config: RunConfig) -> list[Recipe]:
    """The plan's recipe, then those of its groups, each once; none where nothing is pruned by one.

    Raises ImpossiblePlan as `assign_recipes`.
    """
    if plan.cut:
        return []
    recipe = find_recipe(plan, config)
    return list(dict.fromkeys([recipe, *(_complete(group, recipe, config) for group in plan.groups)]))


def assign_recipes(plan: Plan, layers: Layers, config: RunConfig) -> dict[str, Recipe]:
    """The recipe of every layer that is in one of the plan's groups, in the model's order.

    Raises ImpossiblePlan for groups that are none, and for a pattern beside the user's.
    """
    recipe = find_recipe(plan, config)
    groups = assign_groups(plan.groups, layers)
    return {name: _complete(group, recipe, config) for name, group in groups.items()}


def gather_layers(plan: Plan, config: RunConfig, read: Read) -> Layers:
    """The layers, each with what the plan's allocation reads of it: the KL curve of the recipe that it is pruned by.

    `read` gives that for one recipe. Of a cut, which is shared out by none, it is the profile's. Raises ImpossiblePlan.
    """
    if plan.cut:
        return read(Recipe(curves="mask"))
    recipe = find_recipe(plan, config)
    layers = read(recipe)
    recipes = assign_recipes(plan, layers, config)
    others = {other: {x.name: x for x in read(other)} for other in dict.fromkeys(recipes.values()) if other != recipe}
    if not others:
        return layers

    def take(layer: LayerProfile) -> LayerProfile:
        own = others.get(recipes.get(layer.name, recipe))
        if own is None:
            return layer
        measured = own[layer.name]  # of what allocations read, alpha alone is the same by every recipe
        return layer.model_copy(update={"kappa": measured.kappa, "outliers": measured.outliers})

    return [take(layer) for layer in layers]


def _complete(group: Group, recipe: Recipe, config: RunConfig) -> Recipe:
    own = group.recipe.pattern
    if config.pattern and own not in ("", config.pattern):
        raise ImpossiblePlan(
            f"group {group.selector[:80]!r} has pattern {own}, and this run has {config.pattern} in all layers; "
            "leave pattern out"
        )
    return _take_runs_mix(group.recipe.complete(recipe), config)


def _take_runs_mix(recipe: Recipe, config: RunConfig) -> Recipe:
    own = read_mix(config.text_shares or {RUN: 1.0})
    return recipe.model_copy(update={"mix": ()}) if recipe.mix == own else recipe
