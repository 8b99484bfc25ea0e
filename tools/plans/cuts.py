"""Whole parts that go: groups of attention heads and neurons of every block, and whole blocks. No torch.

Stock shapes want the same widths in all blocks that stay, so that how much goes is a few whole numbers; which units of
a block those are is chosen where the model is (`tools.surgery`).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tools.base.errors import ImpossiblePlan
from tools.plans.layer_profile import MOST_SELECTOR, LayerProfile, select_layers

UNITS_HOPE = 2.0
"""How many times the KL that curves of units come to was measured: 1.9 to 2.4 of SmolLM2 at 70 to 90 % of its bytes.

Curves of units see no errors of other blocks; whole blocks that go are measured, beside one another. Of a larger model
with wider MLPs it is more, 20 to 50 of Qwen2.5-Coder-1.5B, whose curves are of fewer tokens than it has neurons: there
the first cut takes neurons where blocks cost less, and rounds try blocks in their place.
"""


@dataclass(frozen=True)
class Counts:
    """How much goes: groups of heads and neurons of every block, and whole blocks."""

    heads: int = 0
    neurons: int = 0
    blocks: int = 0


class Units(BaseModel):
    """Heads or neurons, which every block has as many of."""

    units: int = Field(description="In a block; a head is a group that shares keys and values.")
    cost: float = Field(description="Weights of the block's linear layers that go with one unit.")
    options: list[int] = Field(description="How many may go of every block, ascending from 0; 0 alone where none can.")


class Shape(BaseModel):
    """What of a model can go."""

    blocks: int
    block_cost: float = Field(description="Weights that go with one block.")
    heads: Units
    neurons: Units

    @property
    def kinds(self) -> list[Literal["heads", "neurons"]]:
        """What can go of a block."""
        both: tuple[tuple[Literal["heads", "neurons"], Units], ...] = (("heads", self.heads), ("neurons", self.neurons))
        return [kind for kind, units in both if len(units.options) > 1]


def list_counts(shape: Shape, remove: float, blocks: int) -> list[Counts]:
    """All numbers of heads and neurons that, with so many blocks gone, take `remove` of what all blocks cost away.

    As nearly as whole units allow: for each number of groups of heads that the config accepts the nearest of neurons,
    where that is within half a step of what is asked. Blocks alone are among them.
    """
    heads, neurons = shape.heads, shape.neurons
    half = 0.5 * (neurons.options[-1] - neurons.options[-2] if len(neurons.options) > 1 else 1) * neurons.cost
    left = (remove * shape.blocks - blocks) * shape.block_cost / (shape.blocks - blocks)
    found = []
    for groups in heads.options:
        rest = left - groups * heads.cost
        nearest = min(neurons.options, key=lambda gone: abs(gone * neurons.cost - rest))
        if abs(nearest * neurons.cost - rest) <= half and (counts := Counts(groups, nearest, blocks)) != Counts():
            found.append(counts)
    return found


def list_by_blocks(shape: Shape, remove: float) -> list[list[Counts]]:
    """`list_counts` for every number of whole blocks, from 0; nothing where as much as all blocks is to go."""
    return [list_counts(shape, remove, blocks) for blocks in range(shape.blocks)] if remove < 1 else []


def find_most(every: Sequence[Sequence[Counts]]) -> Counts:
    """The most of each kind that goes by any of the cuts that `list_by_blocks` lists, of which there are some."""
    listed = [counts for of_number in every for counts in of_number]
    return Counts(*(max(getattr(counts, kind) for counts in listed) for kind in ("heads", "neurons", "blocks")))


class Target(BaseModel):
    """What a target comes to in the parts of a model."""

    shape: Shape
    share: float = Field(description="Of what all blocks cost that goes, as planners write it.")


class Cutting(BaseModel):
    """What a plan says of a cut: how it is shared out over groups of heads, neurons and blocks."""

    model_config = ConfigDict(extra="forbid")

    blocks: int | None = Field(
        None,
        ge=0,
        description="Whole blocks that go, in the order of the table; left out, as many as the KL curves say.",
    )
    heads: int | None = Field(
        None,
        ge=0,
        description="Groups of attention heads that go from every block that stays; left out, as many as the KL "
        "curves say. Neurons make up the rest of the sparsity.",
    )
    keep: str = Field(
        "",
        max_length=MOST_SELECTOR,
        exclude_if=operator.not_,
        description="Blocks that do not go whole, such as 'blocks 0-3'; the next ones of the table go instead.",
    )
    refit: bool = Field(True, description="Fit what reads the units that stay, and what precedes blocks that go.")


class CutOrder(BaseModel):
    """A cut, resolved: what goes, of a model whose parts were measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: str = Field(description="Artifact of the order in which the units of every block go.")
    heads: int
    neurons: int
    dropped: tuple[int, ...] = Field(description="Blocks, ascending.")
    refit: bool

    @property
    def counts(self) -> Counts:
        """How much goes."""
        return Counts(self.heads, self.neurons, len(self.dropped))


class Parts(BaseModel):
    """What is known of a model's parts when a cut is planned."""

    shape: Shape
    target: float = Field(description="Share of what all blocks cost that goes at the target.")
    artifact: str = Field(description="Of the order in which the units of every block go.")
    heads: list[list[float]] = Field(
        description="By block: predicted KL where so many groups of heads go as `shape.heads.options` say, up to the "
        "most that any cut takes; nats per token."
    )
    neurons: list[list[float]] = Field(description="The same of neurons.")
    order: list[int] = Field(description="Blocks in the order in which they go, each the one that costs least then.")
    dropped_kl: list[float] = Field(description="Measured KL on calibration text without the first of them, and so on.")
    head_layers: list[list[str]] = Field(description="By block: the layers that a group of heads has weights of.")
    neuron_layers: list[list[str]]

    def predict(self, counts: Counts, dropped: Sequence[int]) -> float:
        """What the units of the blocks that stay cost, and what measured blocks that go, nats per token.

        Of units UNITS_HOPE times what their curves say.
        """
        stays = [block for block in range(self.shape.blocks) if block not in dropped]
        kl = self._find_dropped_kl(dropped)
        for of_kind, units, gone in (
            (self.heads, self.shape.heads, counts.heads),
            (self.neurons, self.shape.neurons, counts.neurons),
        ):
            place = units.options.index(gone)
            kl += UNITS_HOPE * sum(of_kind[block][place] for block in stays) if gone else 0.0
        return kl

    def list_measured(self, remove: float, blocks: int) -> list[Counts]:
        """`list_counts`, as far as curves were measured: those of a cut that takes less than the target may need more
        neurons of every block than the target's, which blocks must go for."""
        return [
            counts
            for counts in list_counts(self.shape, remove, blocks)
            if _reaches(self.heads, self.shape.heads, counts.heads)
            and _reaches(self.neurons, self.shape.neurons, counts.neurons)
        ]

    def _find_dropped_kl(self, dropped: Sequence[int]) -> float:
        """What was measured without blocks that go; where others go than in the order, for some are kept, the sum of
        what each added to it when it went."""
        if set(dropped) == set(self.order[: len(dropped)]):
            return self.dropped_kl[len(dropped) - 1] if dropped else 0.0
        before = [0.0, *self.dropped_kl]
        added = {block: max(before[i + 1] - before[i], 0.0) for i, block in enumerate(self.order)}
        return sum(added[block] for block in dropped)


def _reaches(costs: Sequence[Sequence[float]], units: Units, gone: int) -> bool:
    return not gone or units.options.index(gone) < len(costs[0])


def resolve_cut(cutting: Cutting, parts: Parts, sparsity: float, layers: Sequence[LayerProfile]) -> CutOrder:
    """How much goes of each kind, and which blocks, so that `sparsity` of the blocks' weights goes. Raises
    ImpossiblePlan.

    As nearly as whole units allow.
    """
    kept = {layer.name: layer.block for layer in layers}
    stay = {kept[name] for name in select_layers(cutting.keep, layers)} if cutting.keep else set[int]()
    may_go = [block for block in parts.order if block not in stay]
    if cutting.blocks is not None and cutting.blocks > len(may_go):
        raise ImpossiblePlan(f"{cutting.blocks} blocks cannot go: {len(may_go)} is the most here")
    numbers = range(len(may_go) + 1) if cutting.blocks is None else [cutting.blocks]
    listed = [counts for blocks in numbers for counts in parts.list_measured(sparsity, blocks)]
    chosen = [counts for counts in listed if cutting.heads in (None, counts.heads)]
    if not chosen:
        raise ImpossiblePlan(_explain(cutting, parts, sparsity, listed))
    best = min(chosen, key=lambda counts: parts.predict(counts, may_go[: counts.blocks]))
    dropped = tuple(sorted(may_go[: best.blocks]))
    return CutOrder(parts=parts.artifact, heads=best.heads, neurons=best.neurons, dropped=dropped, refit=cutting.refit)


def _explain(cutting: Cutting, parts: Parts, sparsity: float, listed: Sequence[Counts]) -> str:
    blocks = cutting.blocks or 0
    if not listed:
        most = max((n for n in range(len(parts.order) + 1) if parts.list_measured(sparsity, n)), default=None)
        hint = "other sparsities may" if most is None else f"with {most} blocks it can"
        return f"{sparsity:.2%} of the weights cannot go with {blocks} whole blocks; {hint}"
    numbers = ", ".join(str(heads) for heads in sorted({counts.heads for counts in listed}))
    where = "" if cutting.blocks is None else f" with {blocks} blocks,"
    return f"{cutting.heads} groups of heads cannot go of every block;{where} {numbers} can"


def count_cut_zeros(order: CutOrder, parts: Parts, layers: Sequence[LayerProfile]) -> dict[str, int]:
    """Weights of every layer that go, in the order of `layers`."""
    shares: dict[str, tuple[int, int]] = {}
    for of_kind, units, gone in (
        (parts.head_layers, parts.shape.heads, order.heads),
        (parts.neuron_layers, parts.shape.neurons, order.neurons),
    ):
        shares |= {name: (gone, units.units) for names in of_kind for name in names}
    zeros = {}
    for layer in layers:
        share, of = (1, 1) if layer.block in order.dropped else shares.get(layer.name, (0, 1))
        zeros[layer.name] = layer.weights * share // of
    return zeros


def describe_cut(order: CutOrder, shape: Shape) -> str:
    """`1 of 3 groups of heads, 256 of 1,536 neurons, blocks 5 10`."""
    told = [
        f"{gone:,} of {units.units:,} {name}"
        for gone, units, name in (
            (order.heads, shape.heads, "groups of heads"),
            (order.neurons, shape.neurons, "neurons"),
        )
        if gone
    ]
    told += [f"block{'s' * (len(order.dropped) > 1)} {' '.join(map(str, order.dropped))}"] if order.dropped else []
    return ", ".join(told) + ("" if order.refit else ", no refit")


def describe_cutting(cutting: Cutting) -> str:
    """What a plan says of a cut, in a few words: `cut · heads by KL curves · 2 blocks`."""
    heads = "by KL curves" if cutting.heads is None else str(cutting.heads)
    told = [f"cut · heads {heads}"]
    told += [] if cutting.blocks is None else [f"{cutting.blocks} block{'s' * (cutting.blocks != 1)}"]
    told += [f"not {cutting.keep}"] if cutting.keep else []
    return " · ".join(told) + ("" if cutting.refit else " · no refit")
