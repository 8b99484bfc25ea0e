"""Work orders as artifacts, kept from node to node."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from graph.planning.orders import describe_plan, measure_with, order_cut, resolve
from graph.planning.plan import Plan
from graph.planning.recipes import gather_layers
from graph.state import State
from tools.base.errors import DamagedArtifact
from tools.plans.cuts import CutOrder
from tools.plans.recipe import Recipe
from tools.plans.work_order import LayerOrder, WorkOrder
from tools.workbench.store import ArtifactStore

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench


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
