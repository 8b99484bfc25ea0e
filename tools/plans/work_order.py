"""What a round of pruning will do, layer by layer: the one thing that everybody reads once a plan has been resolved."""

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tools.base.errors import ImpossiblePlan
from tools.plans.allocate import Allocation
from tools.plans.cuts import CutOrder
from tools.plans.layer_profile import LayerProfile, predict_kl, select_layers
from tools.plans.recipe import Recipe


class LayerOrder(BaseModel):
    """What is to become of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Recipe = Field(description="What is done inside the layer (`Recipe.within_layers`).")
    zeros: int = Field(ge=0, description="Weights that are to be zero.")


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
    alone: str = Field(
        "", exclude_if=operator.not_, description="Selector of the layers that it prunes; empty where that is all."
    )
    passed: float = Field(
        1.0,
        gt=0,
        le=1,
        exclude_if=lambda share: share == 1,
        description="Share of the blocks that calibration text passes for statistics behind pruned predecessors.",
    )

    @cached_property
    def id(self) -> str:
        """SHA-256, in hex, of each layer's recipe and zeros, and the polish: orders of one id make the same weights."""
        layers = {name: [layer.recipe.model_dump(), layer.zeros] for name, layer in self.layers.items()}
        parts: object = [layers, {"polish": self.polish}] if self.polish else layers
        parts = self.cut.model_dump() if self.cut else parts
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

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


UNTOUCHED = Recipe(method="magnitude", refit=False)
"""What is done in layers that stay dense: nothing is read for it."""


def prune_alone(order: WorkOrder, selector: str, layers: Sequence[LayerProfile]) -> WorkOrder:
    """The order that prunes the layers of a selector as this one does, and leaves all others dense, unpolished. Behind
    pruned predecessors the text passes no block above the last of them.

    Its predicted KL is by the curves of `layers`, which are those of the model. Without a selector, or of all layers,
    it is the same order. Raises ImpossiblePlan where it means none, or the order prunes none.
    """
    names = set(select_layers(selector, layers)) if selector else {layer.name for layer in layers}
    if len(names) == len(layers):
        return order
    if order.cut:
        raise ImpossiblePlan("alone is of layers that are pruned, and here none is; leave it out")
    tidy = " ".join(selector.split())
    chosen = {name: x if name in names else LayerOrder(recipe=UNTOUCHED, zeros=0) for name, x in order.layers.items()}
    shares = np.array([chosen[layer.name].zeros / layer.weights for layer in layers])
    pruned = [place for place, layer in enumerate(layers) if layer.name in names]
    in_order = [layer.block + 1 for layer in layers if chosen[layer.name].recipe.in_order]
    return WorkOrder(
        layers=chosen,
        sparsity=sum(x.zeros for x in chosen.values()) / sum(layer.weights for layer in layers),
        predicted_kl=predict_kl([layers[place] for place in pruned], shares[pruned]),
        multipliers=order.multipliers,
        line=f"{tidy} alone as by {order.line}",
        alone=tidy,
        passed=max(in_order) / max(layer.block + 1 for layer in layers) if in_order else 1.0,
    )


def order_allocation(recipe: Recipe, allocation: Allocation, polish: int = 0) -> WorkOrder:
    """The order that carries an allocation out with one recipe for all layers, which are polished on so many tokens."""
    sparsity, predicted_kl = allocation.sparsity, allocation.predicted_kl
    return order_all(recipe, allocation.zeros, sparsity=sparsity, predicted_kl=predicted_kl, polish=polish)
