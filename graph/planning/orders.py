"""What a plan comes to: its recipe under the user's pattern, its work order, and its one line for people.

`resolve` is the only place where a plan is shared out over the layers. A plan that is to be carried out is resolved
once, by the KL curves that its recipe asks for, and its order kept (`graph.planning.orders`) for all later nodes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from graph.config import RunConfig
from graph.planning.plan import WORDS, Plan
from graph.planning.recipes import Layers, Read, assign_recipes, find_recipe, gather_layers, list_recipes
from graph.reflecting.posterior import Factor, find_factors, weigh_layers
from graph.reflecting.schema import Lesson
from tools.base.errors import ImpossiblePlan, UserError
from tools.plans.allocate import allocate
from tools.plans.costs import count_polish
from tools.plans.cuts import Cutting, Parts
from tools.plans.groups import describe_levers, identify_group, refuse_two_polishes, refuse_two_walks
from tools.plans.layer_profile import LayerProfile, predict_kl
from tools.plans.methods import Statistics
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder, order_all

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from graph.planning.plan import ONLY_ZEROS
from graph.state import State
from tools.base.errors import DamagedArtifact
from tools.plans.cuts import CutOrder, count_cut_zeros, resolve_cut
from tools.plans.work_order import LayerOrder
from tools.workbench.store import ArtifactStore

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench


def order_cut(plan: Plan, parts: Parts, layers: Sequence[LayerProfile], line: str) -> WorkOrder:
    """What goes of every layer by such a plan, as nearly to its sparsity as whole units allow. Raises ImpossiblePlan.

    The order's sparsity is the plan's: cuts that differ by less than a unit are of one budget.
    """
    usual = Plan(sparsity=plan.sparsity)
    if spoken := [name for name in ONLY_ZEROS if getattr(plan, name) != getattr(usual, name)]:
        raise ImpossiblePlan(f"{spoken[0]} is about single weights, and this run takes parts away; leave it out")
    cut = resolve_cut(plan.cut or Cutting(), parts, plan.sparsity, layers)
    return order_all(
        Recipe(refit=cut.refit),
        count_cut_zeros(cut, parts, layers),
        sparsity=plan.sparsity,
        predicted_kl=parts.predict(cut.counts, cut.dropped),
        line=line,
    ).model_copy(update={"cut": cut})


LESSONS = " · lessons x"
"""What parts a plan's line from how many groups of layers it weighs as lessons say."""

UNIFORM_WANDA = Recipe(method="wanda", refit=False, allocation="uniform")
"""What a result is compared with: Wanda with one sparsity for all layers, behind pruned predecessors as its authors run
it."""


def refuse_above_target(plan: Plan, config: RunConfig) -> None:
    """Raises ValueError with a reason for whoever made the plan."""
    if plan.sparsity > config.target_sparsity + 1e-9:
        raise ValueError(f"sparsity {plan.sparsity:g} is above the target; plan at most {config.target_sparsity:g}")


def apply_lessons(plan: Plan, lessons: Sequence[Lesson], layers: Layers, config: RunConfig) -> Plan:
    """The plan with what lessons say of the KL curves, whatever it said of them; they weigh only where curves are read.

    Every plan goes through here once, whoever made it, before anything is predicted or pruned by it.
    """
    weigh = find_recipe(plan, config).reads_curves
    found = find_lesson_factors(plan, lessons, layers, config) if weigh else {}
    return plan.model_copy(update={"multipliers": {selector: x.factor for selector, x in found.items()}})


def find_lesson_factors(plan: Plan, lessons: Sequence[Lesson], layers: Layers, config: RunConfig) -> dict[str, Factor]:
    """Selectors to what lessons make of the KL curves of a plan's recipes, whether it reads these or not."""
    recipe = find_recipe(plan, config)
    return find_factors(lessons, layers, recipe, plan.sparsity, config.calibration_text, plan.groups)


def resolve(plan: Plan, layers: Layers, config: RunConfig) -> WorkOrder:
    """For every layer its recipe and its exact number of zeros, within the config's bounds. Raises ImpossiblePlan.

    Lessons multiply the KL curves of `layers` first, and the plan's own factors come on top. The predicted KL is
    that of the curves as they are. The order's id says nothing of multipliers: they change no weight but by the zeros.
    """
    if plan.recipe.pattern and not config.pattern:
        raise ImpossiblePlan(f"pattern {plan.recipe.pattern} of the whole plan is the user's to say; give it in groups")
    recipe, others = find_recipe(plan, config), assign_recipes(plan, layers, config)
    refuse_two_walks([recipe, *others.values()])
    refuse_two_polishes(recipe, others.values())
    shared = allocate(
        weigh_layers(layers, plan.multipliers),
        plan.sparsity,
        recipe,
        plan.adjustments,
        protect=config.protect,
        max_layer_sparsity=config.max_layer_sparsity,
        patterns={name: other.group for name, other in others.items() if other.group},
    )
    sparsity = np.array([shared.zeros[layer.name] / layer.weights for layer in layers])
    return order_all(
        recipe,
        shared.zeros,
        sparsity=shared.sparsity,
        predicted_kl=predict_kl(layers, sparsity),
        multipliers=plan.multipliers,
        line=describe_plan(plan),
        polish=count_polish_tokens(recipe, config),
        others=others,
    )


def refuse_impossible_target(layers: Layers, config: RunConfig) -> None:
    """Raises UserError where no plan can meet the config's target within its bounds, by the layers' sizes alone."""
    try:
        resolve(Plan(sparsity=config.target_sparsity, recipe=Recipe(allocation="uniform")), layers, config)
    except ImpossiblePlan as error:
        advice = (
            "a pattern is a target of its own: leave target_sparsity out"
            if config.pattern
            else f"see target_sparsity, max_layer_sparsity ({config.max_layer_sparsity:g}) and protect"
        )
        raise UserError(f"the target cannot be met: {error}; {advice}") from error


def count_polish_tokens(recipe: Recipe, config: RunConfig) -> int:
    """Tokens that a recipe polishes on; 0 for none.

    Raises ImpossiblePlan where the config allows none, or fewer, or the text or they are too few for it.
    """
    tokens = recipe.count_polish(config.polish_tokens)
    if tokens > config.polish_tokens:
        raise ImpossiblePlan(f"polish on {tokens:,} tokens; this run allows {config.polish_tokens:,} (polish_tokens)")
    if tokens:
        count_polish(config, tokens, len(recipe.mix))
    return tokens


def order_uniform(
    layers: Layers, sparsity: float, pattern: str, protect: Sequence[str], statistics: Statistics
) -> WorkOrder:
    """UNIFORM_WANDA by such statistics to a sparsity, or a pattern for all layers but the protected.

    Raises ImpossiblePlan.
    """
    recipe = UNIFORM_WANDA.model_copy(update={"pattern": pattern, "statistics": statistics})
    shared = allocate(layers, sparsity, recipe, protect=protect if pattern else [])
    return order_all(recipe, shared.zeros, sparsity=shared.sparsity, predicted_kl=shared.predicted_kl)


# The plans of one round


class Curves(NamedTuple):
    """Layers to share a plan out over, as far as they are known."""

    layers: Layers
    exact: bool
    """Whether the plan's recipe goes by these KL curves, or by some that are not measured yet."""


@dataclass
class Orders:
    """Resolves the plans of one round, each once."""

    config: RunConfig
    lessons: Sequence[Lesson]
    layers: Layers
    """The profile."""
    read_layers: Callable[[Recipe], Curves] | None = None
    """What is known of the layers for a recipe's allocation, without a run of the model; without it, the profile."""
    parts: Parts | None = None
    """What is known of the model's parts, in a run that takes them away."""
    _curves: dict[Recipe, Curves] = field(default_factory=dict)
    _drafts: dict[tuple[str, bool], WorkOrder] = field(default_factory=dict)

    def weigh(self, plan: Plan) -> Plan:
        """The plan with what the lessons say."""
        if self.parts is not None:
            return plan if plan.cut else plan.model_copy(update={"cut": Cutting()})
        return apply_lessons(plan, self.lessons, self.layers, self.config)

    def draft(self, plan: Plan) -> WorkOrder:
        """The order of a plan by the curves that are known, which need not be those that it asks for.

        Raises ImpossiblePlan.
        """
        if self.parts is not None:
            return order_cut(plan, self.parts, self.layers, describe_plan(plan))
        if plan.cut:
            raise ImpossiblePlan("cut is of runs that take parts away, and this one sets weights to zero; leave it out")
        curves = self._find_curves(plan)
        key = plan.model_dump_json(exclude=WORDS | {"reprofile"}), curves.exact
        if key not in self._drafts:
            self._drafts[key] = resolve(plan, curves.layers, self.config)
        return self._drafts[key]

    def identify(self, plan: Plan) -> str:
        """The id of the plan's order; empty where it hangs on curves that are not measured. Raises ImpossiblePlan."""
        return "" if self.list_unknown(plan) else self.draft(plan).id

    def resolve(self, plan: Plan, measure: Read) -> WorkOrder:
        """The order of a plan by the curves that it asks for, which are measured if need be. Raises ImpossiblePlan."""
        draft = self.draft(plan)  # refused before curves come for nothing
        missing = self.list_unknown(plan)
        self._curves |= {recipe: Curves(measure(recipe), exact=True) for recipe in missing}
        return self.draft(plan) if missing else draft

    def list_unknown(self, plan: Plan) -> list[Recipe]:
        """The recipes of a plan whose curves it asks for, and which are not measured. Raises ImpossiblePlan."""
        return [recipe for recipe in list_recipes(plan, self.config) if not self._read(recipe).exact]

    def _find_curves(self, plan: Plan) -> Curves:
        known = {recipe: self._read(recipe) for recipe in list_recipes(plan, self.config)}
        layers = gather_layers(plan, self.config, lambda recipe: known[recipe].layers)
        return Curves(layers, all(curves.exact for curves in known.values()))

    def _read(self, recipe: Recipe) -> Curves:
        if (known := self._curves.get(recipe)) is not None:
            return known
        read = self.read_layers or (lambda recipe: Curves(self.layers, not recipe.needs_curves))
        curves = read(recipe)
        if curves.exact:
            self._curves[recipe] = curves
        return curves


def read_curves(bench: "Workbench", profile: str, recipe: Recipe, progress: "Progress") -> Curves:
    """What the workbench knows of the layers for a recipe's allocation. Raises ImpossiblePlan for a text there is not.

    No weight in the model is touched.
    """
    if bench.curves.has_layers(profile, recipe):
        return Curves(bench.curves.describe_layers(profile, recipe, progress), exact=True)
    return Curves(bench.curves.read_layers(profile, recipe, progress), exact=False)


def measure_with(bench: "Workbench", profile: str, present: str, progress: "Progress") -> Read:
    """Gives the layers with all that a recipe's allocation needs, measured if need be.

    The weights in the model are those of `present` before and after.
    """

    def measure(recipe: Recipe) -> Layers:
        try:
            return bench.curves.describe_layers(profile, recipe, progress)
        finally:
            bench.pruner.restore(present)  # curves are measured on the dense weights

    return measure


def hash_request(plan: Plan) -> str:
    """SHA-256 of what a plan asks for, lessons aside: sparsity (to a tenth of a percent), recipes, factors, bounds."""
    adjustments = [[" ".join(a.selector.split()), a.action, a.factor, a.low, a.high] for a in plan.adjustments]
    parts: list[Any] = [round(plan.sparsity, 3), plan.recipe.label, adjustments]
    if plan.groups:
        parts.append([identify_group(group, plan.recipe) for group in plan.groups])
    if plan.new_texts:
        parts.append([[text.name, text.prompts, text.weight] for text in plan.new_texts])
    if plan.cut:
        parts.append(plan.cut.model_dump())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# For people, and for the log


def record_plan(plan: Plan, order: WorkOrder) -> dict[str, Any]:
    """What a run's log says of a plan."""
    return {
        "plan": order.line,
        "reason": plan.reason,
        "predicted_kl": order.predicted_kl,
        "order": order.id,
        "details": plan.model_dump(),
    }


def describe_plan(plan: Plan) -> str:
    """A plan in one line for people (`describe_levers`), such as `45.0% refit:kappa · *.v_proj x2 · lessons x3
    (0.80–1.41)`: for so many groups of layers lessons multiply the KL curves, from what to what."""
    line = describe_levers(plan)
    if plan.cut or not plan.multipliers:
        return line
    factors = plan.multipliers.values()
    low, high = f"{min(factors):.2f}", f"{max(factors):.2f}"
    return f"{line}{LESSONS}{len(factors)} ({low if low == high else f'{low}–{high}'})"


def drop_lessons(line: str) -> str:
    """A plan's line without what it says of lessons."""
    return line.partition(LESSONS)[0]


def group_kl(group: Sequence[LayerProfile], sparsity: dict[str, float]) -> float:
    """Predicted KL of a group of layers at these sparsities, nats per token."""
    return predict_kl(group, np.array([sparsity[layer.name] for layer in group]))


class _Kept(BaseModel):
    """An order as an artifact: a recipe that many layers share is written once."""

    plan: Plan
    recipes: list[Recipe]
    layers: list[tuple[str, int, int]]
    """(name, number of its recipe, zeros) of every layer, in the model's order."""
    sparsity: float
    predicted_kl: float
    polish: int = 0
    cut: CutOrder | None = Field(None, exclude_if=lambda cut: cut is None)


def keep_order(store: ArtifactStore, plan: Plan, order: WorkOrder) -> str:
    """Write the order of a plan as an artifact; its hash."""
    recipes = list(dict.fromkeys(layer.recipe for layer in order.layers.values()))
    kept = _Kept(
        plan=plan,
        recipes=recipes,
        layers=[(name, recipes.index(layer.recipe), layer.zeros) for name, layer in order.layers.items()],
        sparsity=order.sparsity,
        predicted_kl=order.predicted_kl,
        polish=order.polish,
        cut=order.cut,
    )
    return store.write_json(kept.model_dump())


def read_order(store: ArtifactStore, artifact: str, plan: Plan) -> WorkOrder | None:
    """The order that was kept for exactly this plan; None where it was not, or for another. Raises DamagedArtifact."""
    kept = _Kept.model_validate(store.read_json(artifact)) if artifact else None
    if kept is None or kept.plan.model_dump() != plan.model_dump():
        return None
    return WorkOrder(
        layers={name: LayerOrder(recipe=kept.recipes[number], zeros=zeros) for name, number, zeros in kept.layers},
        sparsity=kept.sparsity,
        predicted_kl=kept.predicted_kl,
        multipliers=plan.multipliers,
        line=describe_plan(plan),
        polish=kept.polish,
        cut=kept.cut,
    )


def find_kept(bench: "Workbench", state: State) -> WorkOrder | None:
    """The order that was kept of the state's plan, before it was carried out; None where it was not, or is damaged."""
    assert state.plan is not None, "the plan node runs first"
    try:
        return read_order(bench.store, state.order, state.plan)
    except DamagedArtifact as error:
        bench.warn(f"{error}; the plan is resolved again")
        return None


def find_order(bench: "Workbench", state: State, progress: "Progress") -> WorkOrder:
    """The order of the state's plan; made here where the plan was edited between nodes.

    The weights in the model end as the state says. Raises ImpossiblePlan.
    """
    return find_kept(bench, state) or resolve_again(bench, state, progress)


def resolve_again(bench: "Workbench", state: State, progress: "Progress") -> WorkOrder:
    """As `find_order`, whatever was kept."""
    assert state.plan is not None, "the plan node runs first"
    profile = bench.profiles.read(state.profile).layers
    if state.parts:
        return order_cut(state.plan, bench.cuts.read(state.parts), profile, describe_plan(state.plan))
    layers = gather_layers(state.plan, state.config, measure_with(bench, state.profile, state.current, progress))
    return resolve(state.plan, layers, state.config)
