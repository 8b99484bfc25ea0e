"""Arms that are no runs of the graph: fixed recipes, the rule's list, random plans and a search, on the workbench."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from graph.ablation.settings import FIXED, AblateSettings, list_fixed
from graph.config import RunConfig, check_config
from graph.planning.budget import TokenBudget
from graph.planning.orders import Curves, describe_plan, resolve
from graph.planning.plan import Plan
from graph.planning.recipes import gather_layers
from graph.planning.refinements import STRONG, change_levers
from graph.planning.situation import Situation
from tools.base.errors import BrokenPlan, ImpossiblePlan, UserError
from tools.base.settings import TeamSettings
from tools.plans.costs import count_in_order, count_polish, list_curve_costs, list_order_costs
from tools.plans.evolve import describe_search
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import WorkOrder, order_allocation
from tools.results.losses import Evaluation
from tools.results.trial import Trial
from tools.workbench.search import search_allocation

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.plans.groups import Group, GroupRecipe
from tools.plans.layer_profile import group_layers
from tools.plans.methods import METHODS, MOST_STEPS
from tools.plans.mix import Mix, read_mix
from tools.plans.recipe import Adjustment
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


MOST_DRAWS = 1000
"""Random plans that are drawn at most: of a model whose bounds allow next to none the arm ends all the same."""


class ArmResult(NamedTuple):
    """What an arm chose."""

    checkpoint: str
    plan: str
    trials: int
    tokens: int
    failed: int = 0
    """Plans that no allocation could meet, or that broke."""
    dear: int = 0
    """Plans that took more tokens than were left."""


def make_config(settings: AblateSettings) -> RunConfig:
    """The bounds and the budget of an arm, as a run of the graph has them. Raises UserError for what no run may be."""
    return check_config(
        {name: getattr(settings, name) for name in TeamSettings.model_fields}
        | {name: getattr(settings, name) for name in ("target_sparsity", "max_layer_sparsity", "polish_tokens")}
        | {"max_evaluated_tokens": settings.evaluated_tokens}
    )


@dataclass
class Arm:
    """One arm at work, with its own budget."""

    bench: "Workbench"
    profile: str
    settings: AblateSettings
    progress: "Progress"
    began: float
    """By the monotonic clock, as if it had made the profile itself."""
    config: RunConfig = field(init=False)
    budget: TokenBudget = field(init=False)
    trials: int = 0
    failed: int = 0
    dear: int = 0
    _seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.config = make_config(self.settings)
        self.budget = TokenBudget(self.config, 0, self.settings.validation_tokens)

    @property
    def is_over(self) -> bool:
        """Whether there is no more trial in the budget, or no more time."""
        late = self.settings.seconds and time.monotonic() - self.began >= self.settings.seconds
        return bool(late) or self.budget.left < self.budget.trial

    def keep_best(self, plans: Iterator[Plan]) -> ArmResult:
        """Carry plans out while the budget lasts, as many at once as can be measured; the one of least KL.

        The first trial is made whatever the clock says. Plans that cannot be met or paid are passed over and counted.
        Raises UserError where none is left.
        """
        best: tuple[float, str, str] | None = None
        for batch in self._make_batches(plans):
            for (checkpoint, plan), evaluation in zip(batch, self._measure([c for c, _ in batch]), strict=True):
                if evaluation is None:
                    self.failed += 1
                    continue
                self.trials += 1
                kl = math.inf if evaluation.mean_kl is None else evaluation.mean_kl
                if best is None or kl < best[0]:
                    best = kl, checkpoint, describe_plan(plan)
            if best is not None:
                self.bench.pruner.forget([best[1]])
        if best is None:
            raise UserError(
                f"no plan of it comes to {self.settings.target_sparsity:.2%} within {self.settings.evaluated_tokens:,} "
                f"tokens ({self.failed} failed, {self.dear} took more than were left); raise --evaluated-tokens or "
                "--max-layer-sparsity"
            )
        return ArmResult(best[1], best[2], self.trials, self.budget.tokens, self.failed, self.dear)

    def _make_batches(self, plans: Iterator[Plan]) -> Iterator[list[tuple[str, Plan]]]:
        """(checkpoint, plan) of as many as are measured at once."""
        while True:
            batch: list[tuple[str, Plan]] = []
            while len(batch) < self.bench.crew.abreast and not (self.is_over and (batch or self.trials)):
                plan = next(plans, None)
                if plan is None:
                    break
                if checkpoint := self._make(plan):
                    batch.append((checkpoint, plan))
            if not batch:
                return
            yield batch

    def _make(self, plan: Plan) -> str:
        """The checkpoint of a plan, paid for with its trial; "" where it is passed over."""
        try:
            draft = self._resolve(plan, self.bench.curves.read_layers)  # refused before anything is measured
            if self.budget.left < self.budget.trial or self.budget.refuse(plan, draft):
                self.dear += 1
                return ""
            self.budget.pay(self.budget.list_costs(plan, None))
            order = self._resolve(plan, self.bench.curves.describe_layers)
            if order.id in self._seen:
                return ""
            self._seen.add(order.id)
            self.budget.tokens += self.budget.trial
            self.budget.pay(list_order_costs(order, self.config))
            return self.bench.pruner.prune(self.profile, order, self.progress)
        except ImpossiblePlan:  # one that broke is one, too
            self.failed += 1
            return ""

    def _resolve(self, plan: Plan, read: Callable[[str, Recipe, "Progress"], list[LayerProfile]]) -> WorkOrder:
        layers = gather_layers(plan, self.config, lambda recipe: read(self.profile, recipe, self.progress))
        return resolve(plan, layers, self.config)

    def _measure(self, checkpoints: list[str]) -> list[Evaluation | None]:
        """Losses on the validation text; None of what breaks."""
        windows = len(self.bench.windows.validation)
        try:
            return list(self.bench.evaluator.evaluate_each(checkpoints, windows, self.profile, self.progress))
        except BrokenPlan:
            return [None] if len(checkpoints) == 1 else [self._measure([x])[0] for x in checkpoints]


def plan_recipes(arm: Arm) -> Iterator[Plan]:
    """The default recipe, then the fixed ones."""
    for label in dict.fromkeys([Recipe().label, *list_fixed(arm.settings)]):
        yield Plan(sparsity=arm.config.target_sparsity, recipe=parse_recipe(label))


def plan_list(arm: Arm) -> Iterator[Plan]:
    """The strong recipe, then what the rule would try from there, one lever at a time, in its order."""
    base = Plan(sparsity=arm.config.target_sparsity, recipe=STRONG)
    yield base
    layers = arm.bench.profiles.read(arm.profile).layers
    zeros = resolve(base, layers, arm.config).zeros
    situation = Situation(
        config=arm.config,
        layers=layers,
        sparsity={layer.name: zeros[layer.name] / layer.weights for layer in layers},
        dense=Trial(
            iteration=0, checkpoint="dense", sparsity=0, perplexity=None, kl=0, predicted_kl=0, verdict="accept"
        ),
        read_layers=lambda recipe: Curves(arm.bench.curves.read_layers(arm.profile, recipe, arm.progress), exact=False),
    )
    yield from change_levers(situation, base)


def plan_at_random(arm: Arm) -> Iterator[Plan]:
    """Draws of this seed."""
    layers = arm.bench.profiles.read(arm.profile).layers
    for number in range(MOST_DRAWS):
        yield draw_plan(layers, arm.config, number)


def try_search(arm: Arm) -> ArmResult:
    """EvoPress's super-fast search, as long as the tokens allow beside the trial that measures what it found, with the
    weights of the default recipe."""
    recipe, settings = Recipe(allocation="uniform"), arm.settings
    found = search_allocation(
        arm.bench,
        arm.profile,
        recipe,
        settings.target_sparsity,
        arm.progress,
        tokens=max(settings.evaluated_tokens - arm.budget.trial, 1),  # 0 would mean no limit
        max_layer_sparsity=settings.max_layer_sparsity,
    )
    checkpoint = arm.bench.pruner.prune(arm.profile, order_allocation(recipe, found.allocation), arm.progress)
    assert found.searched is not None
    label = f"{recipe.mask_label}:evolution, {describe_search(*found.searched[:3], found.tokens)}"
    return ArmResult(checkpoint, label, found.searched.measured, found.tokens + arm.budget.trial)


PLANS: dict[str, Callable[[Arm], Iterator[Plan]]] = {
    "kappa": plan_recipes,
    "grid": plan_list,
    "random": plan_at_random,
}
"""What arms try, in order."""


def choose(row: str, arm: Arm) -> ArmResult:
    """What the arm of a row chooses. Raises UserError where nothing can be carried out, and BrokenPlan."""
    if row == "search":
        return try_search(arm)
    if row in FIXED:
        return arm.keep_best(iter([Plan(sparsity=arm.config.target_sparsity, recipe=parse_recipe(row))]))
    return arm.keep_best(PLANS[row](arm))


def price_recipe(label: str, settings: AblateSettings) -> int:
    """Tokens that one plan of a recipe puts through the model, its trial among them."""
    recipe, config = parse_recipe(label), make_config(settings)
    walked = count_in_order({recipe.statistics}, config)
    tokens = recipe.count_polish(settings.polish_tokens)
    polished = count_polish(config, tokens) if tokens else 0
    return sum(list_curve_costs(recipe, config).values()) + walked + polished + settings.validation_tokens
