"""What a round of pruning will do, layer by layer: the one thing that everybody reads once a plan has been resolved."""

import hashlib
import json
import operator
from collections.abc import Mapping
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field

from tools.plans.allocate import Allocation
from tools.plans.cuts import CutOrder
from tools.plans.recipe import Recipe


class LayerOrder(BaseModel):
    """What is to become of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Recipe = Field(description="What is done inside the layer (`Recipe.within_layers`).")
    zeros: int = Field(ge=0, description="Weights that are to be zero.")
    taken: str = Field(
        "",
        exclude_if=operator.not_,
        description="The checkpoint that the layer was made for and is taken from, as it is; empty where it is pruned.",
    )


class WorkOrder(BaseModel):
    """A plan, resolved once: for every layer its recipe and its number of zeros."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: dict[str, LayerOrder] = Field(description="By layer name, in the model's order.")
    sparsity: float = Field(description="Share of all prunable weights that will be zero.")
    predicted_kl: float = Field(
        description="Sum of the unweighted KL curves that the order was allocated by, nats per token."
    )
    multipliers: dict[str, float] = Field({}, description="Selectors to the factors that lessons put on those curves.")
    line: str = Field("", description="For people; two orders may share it.")
    polish: int = Field(
        0,
        ge=0,
        description="Tokens of calibration text that all pruned layers together are polished on once all are pruned.",
    )
    cut: CutOrder | None = Field(
        None,
        exclude_if=lambda cut: cut is None,
        description="The parts that go, whose weights are the zeros; null where weights are set to zero one by one.",
    )

    @cached_property
    def id(self) -> str:
        """SHA-256, in hex, of each layer's recipe and zeros, and the polish: orders of one id make the same weights."""
        former = {"calibration": "run"}  # which a recipe said before it had a mix: orders are called as ever
        layers = {
            name: [layer.recipe.model_dump() | former, layer.zeros, *([layer.taken] if layer.taken else [])]
            for name, layer in self.layers.items()
        }
        parts: object = [layers, {"polish": self.polish}] if self.polish else layers
        parts = self.cut.model_dump() if self.cut else parts
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def grafted(self) -> bool:
        """Whether layers are taken from checkpoints, all of them, and none is pruned."""
        return any(layer.taken for layer in self.layers.values())

    @property
    def zeros(self) -> dict[str, int]:
        """Layer name to number of zero weights, in layer order."""
        return {name: layer.zeros for name, layer in self.layers.items()}


def order_all(
    recipe: Recipe,
    zeros: dict[str, int],
    *,
    sparsity: float,
    predicted_kl: float,
    multipliers: dict[str, float] | None = None,
    line: str = "",
    polish: int = 0,
    others: Mapping[str, Recipe] | None = None,
) -> WorkOrder:
    """The order that has one recipe for all layers but those with `others`, all polished on so many tokens."""
    own = {name: other.within_layers() for name, other in (others or {}).items()}
    within = recipe.within_layers()
    return WorkOrder(
        layers={name: LayerOrder(recipe=own.get(name, within), zeros=count) for name, count in zeros.items()},
        sparsity=sparsity,
        predicted_kl=predicted_kl,
        multipliers=multipliers or {},
        line=line,
        polish=polish,
    )


def order_allocation(recipe: Recipe, allocation: Allocation, polish: int = 0) -> WorkOrder:
    """The order that carries an allocation out with one recipe for all layers, which are polished on so many tokens."""
    sparsity, predicted_kl = allocation.sparsity, allocation.predicted_kl
    return order_all(recipe, allocation.zeros, sparsity=sparsity, predicted_kl=predicted_kl, polish=polish)
