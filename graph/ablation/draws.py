"""Random plans: drawn from every lever that a planner has."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from graph.config import RunConfig
from graph.planning.plan import Plan
from tools.plans.groups import Group, GroupRecipe
from tools.plans.layer_profile import LayerProfile, group_layers
from tools.plans.methods import METHODS, MOST_STEPS
from tools.plans.mix import Mix, read_mix
from tools.plans.recipe import Adjustment, Recipe
from tools.plans.rules import RULES

MOST_ADJUSTED = 4
"""Groups of layers that a random plan corrects at most."""
MOST_GROUPS = 2
"""Kinds of layers that have a recipe of their own at most; one is left to the plan's."""
PATTERN = "2:4"
DAMPINGS = (0.1, 0.3, 1.0, 3.0)
FACTORS = (0.5, 2.0)
"""Between which a group is counted otherwise than predicted, evenly in its logarithm."""


class _Draws:
    """A generator of one plan's draws."""

    def __init__(self, seed: int, number: int) -> None:
        self.generator = np.random.default_rng([seed, number])

    def pick(self, values: Sequence[Any]) -> Any:
        return values[int(self.generator.integers(len(values)))]

    def between(self, low: float, high: float) -> float:
        return round(float(self.generator.uniform(low, high)), 3)

    def leave(self, default: Any, others: Sequence[Any]) -> Any:
        """The default for half of the plans, else one of the others."""
        return default if not others or self.generator.random() < 0.5 else self.pick(others)


def draw_plan(layers: Sequence[LayerProfile], config: RunConfig, number: int) -> Plan:
    """A plan at the target, of the config's seed and this number alone.

    Half of all plans have a lever as a planner has it who leaves it alone; the others have what was drawn of it.
    """
    draws, usual = _Draws(config.seed, number), Recipe()
    recipe = Recipe(
        method=draws.leave(usual.method, [name for name in METHODS if name != usual.method]),
        refit=draws.leave(usual.refit, [False]),
        refit_steps=draws.leave(usual.refit_steps, range(1, MOST_STEPS + 1)),
        allocation=draws.leave(usual.allocation, [name for name in RULES if name != usual.allocation]),
        strength=draws.leave(usual.strength, [draws.between(0, 1)]),
        gamma=draws.leave(usual.gamma, ["clipped"]),
        curves=draws.leave(usual.curves, ["mask"]),
        statistics=draws.leave(usual.statistics, ["sequential"]),
        polish=draws.leave(usual.polish, [True] if config.polish_tokens else []),
    )
    groups = sorted(group_layers(layers))
    count = draws.leave(0, range(1, min(MOST_ADJUSTED, len(groups)) + 1))
    chosen = draws.generator.choice(len(groups), count, replace=False)
    adjustments = [_draw_adjustment(groups[place], recipe, config, draws) for place in sorted(chosen.tolist())]
    own = _draw_groups(layers, recipe, config, draws)  # late, for which plans without them stay as they were
    recipe = recipe.model_copy(update={"damping": draws.leave(usual.damping, DAMPINGS)})
    if config.mixable:
        recipe = recipe.model_copy(update={"mix": draws.leave(usual.mix, [_draw_mix(config.mixable, draws)])})
    return Plan(sparsity=config.target_sparsity, recipe=recipe, groups=own, adjustments=adjustments)


def _draw_mix(texts: Sequence[str], draws: _Draws) -> Mix:
    """What each text counts, every division as likely as any other."""
    shares = draws.generator.dirichlet(np.ones(len(texts)))
    mix: Mix = read_mix(dict(zip(texts, shares.tolist(), strict=True)))
    return mix


def _draw_groups(layers: Sequence[LayerProfile], recipe: Recipe, config: RunConfig, draws: _Draws) -> list[Group]:
    """Whole kinds of layers by other recipes, each of whose levers half of them leave as in the plan's."""
    kinds = sorted({layer.kind for layer in layers})
    count = draws.leave(0, range(1, min(MOST_GROUPS, len(kinds) - 1) + 1))
    chosen = draws.generator.choice(len(kinds), count, replace=False)
    return [_draw_group(kinds[place], layers, recipe, config, draws) for place in sorted(chosen.tolist())]


def _draw_group(kind: str, layers: Sequence[LayerProfile], recipe: Recipe, config: RunConfig, draws: _Draws) -> Group:
    inputs = [layer.inputs for layer in layers if layer.kind == kind]
    fits = not config.pattern and all(width and width % 4 == 0 for width in inputs)
    others: dict[str, Sequence[Any]] = {
        "method": list(METHODS),
        "refit": [True, False],
        "refit_steps": range(1, MOST_STEPS + 1),
        "gamma": ["plain", "clipped"],
        "statistics": ["dense", "sequential"],
        "pattern": ["", *([PATTERN] if fits else [])],
        "damping": DAMPINGS,
    }
    drawn = {
        name: draws.leave("", [value for value in values if value != getattr(recipe, name)])
        for name, values in others.items()
    }
    own = {name: value for name, value in drawn.items() if value != ""}
    if config.mixable and (mix := draws.leave((), [_draw_mix(config.mixable, draws)])):
        own["mix"] = mix
    return Group(selector=kind, recipe=GroupRecipe.model_validate(own))


def _draw_adjustment(selector: str, recipe: Recipe, config: RunConfig, draws: _Draws) -> Adjustment:
    action = draws.pick(("factor", "bounds", "protect") if recipe.reads_curves else ("bounds", "protect"))
    if action == "factor":
        low, high = np.log(FACTORS)
        factor = round(float(np.exp(draws.generator.uniform(low, high))), 3)
        return Adjustment(selector=selector, action=action, factor=factor)
    if action == "protect":
        return Adjustment(selector=selector, action=action)
    target = config.target_sparsity
    low = draws.between(0, target)
    return Adjustment(selector=selector, action=action, low=low, high=draws.between(target, config.max_layer_sparsity))
