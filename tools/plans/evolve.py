"""EvoPress (arXiv 2410.14649): an evolutionary search over how many weights each layer loses. It knows no model.

A layer may lose as much as in the uniform allocation, or up to MAX_LEVEL steps more or less; a step is the same number
of weights in every layer. A child is its parent with a step moved from one layer to another, one to MAX_SWAPS times,
so that the budget is met to the weight. Children are measured on little text, the best of them on more, and the best
of those together with their parent on the most: the best one is the next generation's parent.

How long and on how much text is published (EFFORTS); the mutation, the levels, the KL divergence as fitness and a step
of 3 % of the mean layer are, too (a million weights, where the mean layer of Mistral-7B has 31 million). Two things are
otherwise in the authors' code (github.com/IST-DASLab/EvoPress): a child there may be its parent over again, and the
parent joins each stage that has as many survivors as the last one, not the last one alone as in the paper's algorithm.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from tools.base.errors import UserError
from tools.plans.allocate import allocate, find_bounds
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.rules import UNIFORM

MAX_LEVEL = 8
"""Steps a layer may be away from the uniform allocation, as in the paper's runs."""

MAX_SWAPS = 3
"""Steps a child moves at most; the lesser of two draws, so that one is the likeliest."""

_TRIES = 10
"""Draws for each child wanted: a small model may not have as many different ones."""

Levels = NDArray[np.int64]

Measure = Callable[[list[dict[str, int]], list[int]], list[float]]
"""KL(dense || pruned) in nats per token of each of (candidates: zeros of each layer, windows of text to measure on)."""


class Stage(NamedTuple):
    """One round of selection."""

    survivors: PositiveInt
    tokens: PositiveInt


class Effort(NamedTuple):
    """How long to search, and on how much text."""

    generations: int
    children: int
    stages: tuple[Stage, ...]


EffortName = Literal["fast", "full"]

EFFORTS: dict[EffortName, Effort] = {
    "fast": Effort(400, 16, (Stage(1, 512), Stage(1, 8192))),
    "full": Effort(400, 64, (Stage(8, 2048), Stage(2, 16384), Stage(1, 65536))),
}
"""The paper's two settings for unstructured sparsity: "super-fast", and the one of its main results."""


def describe_effort(effort: Effort) -> str:
    """For people."""
    stages = ", ".join(f"{stage.survivors} by {stage.tokens:,} tokens" for stage in effort.stages)
    return f"{effort.generations} generations of {effort.children} children, of which are kept {stages}"


def describe_search(generations: int, planned: int, children: int, tokens: int) -> str:
    """How long a search was, for people."""
    return f"{generations} of {planned} generations of {children} children, {tokens:,} tokens"


class SearchSettings(BaseModel):
    """How long and on how much text to search; by default the paper's super-fast setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: int = Field(ge=1, description="Tokens in a window of text.")
    windows: int = Field(ge=1, description="How many windows there are to draw from.")
    tokens: int = Field(
        0, ge=0, description="Tokens that may be put through pruned models, over all generations; 0: no cap."
    )
    generations: int = Field(EFFORTS["fast"].generations, ge=1, description="Generations, where the tokens allow them.")
    children: int = Field(EFFORTS["fast"].children, ge=1, description="Children in each generation.")
    stages: list[Stage] = Field(
        [*EFFORTS["fast"].stages],
        min_length=1,
        description="Rounds of selection: how many survive, measured on how many tokens: as many windows as come "
        "nearest, but at least one, and at most all that there are.",
    )
    step: float = Field(0.03, gt=0, le=1, description="Weights moved at once, as a share of the mean layer's.")
    seed: int = Field(0, ge=0, description="Seed of the children and of the windows drawn.")
    protect: list[str] = Field([], description="Selectors of layers that are never touched.")
    max_layer_sparsity: float = Field(1.0, gt=0, le=1, description="No layer is pruned further than this.")

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.stages[-1].survivors != 1:
            raise ValueError("the last stage must have one survivor")
        return self

    @property
    def planned_tokens(self) -> int:
        """The most tokens that the search puts through models."""
        planned = self.generations * self.count_tokens(self.children)
        return min(planned, self.tokens or planned)

    def count_windows(self, stage: Stage) -> int:
        """How many windows a stage measures on."""
        return min(max(1, round(stage.tokens / self.window)), self.windows)

    def count_tokens(self, children: int) -> int:
        """Tokens that a generation with so many children puts through models."""
        windows, candidates = 0, children
        for i, stage in enumerate(self.stages):
            candidates += i == len(self.stages) - 1  # the parent joins
            windows += candidates * self.count_windows(stage)
            candidates = min(candidates, stage.survivors)
        return windows * self.window


def follow_effort(name: EffortName, **others: Any) -> SearchSettings:
    """The settings of a published search, on other texts, tokens and bounds."""
    generations, children, stages = EFFORTS[name]
    return SearchSettings(generations=generations, children=children, stages=list(stages), **others)


class Search(BaseModel):
    """Where a search stands after a generation; given back to `evolve`, it goes on as if never interrupted."""

    zeros: dict[str, int] = Field(description="The best allocation so far: layer name to number of zero weights.")
    generation: int = Field(0, description="Generations done.")
    tokens: int = Field(0, description="Tokens put through pruned models.")
    children: int = Field(0, description="Children measured, over all generations.")
    kl: float | None = Field(
        None,
        description="KL of the best allocation on the last stage's windows, nats per token; they are other windows in "
        "each generation, so that values do not compare. Null before the first, or where it was not finite.",
    )


class _Space(NamedTuple):
    """The allocations that a search may reach."""

    names: list[str]
    uniform: Levels
    """Zeros at level 0."""
    step: int
    low: Levels
    high: Levels

    def zeros(self, levels: Levels) -> dict[str, int]:
        return dict(zip(self.names, (self.uniform + self.step * levels).tolist(), strict=True))

    def levels(self, zeros: dict[str, int]) -> Levels:
        """Raises UserError when the zeros are not an allocation of this space."""
        if list(zeros) == self.names:
            levels, rest = np.divmod(np.array(list(zeros.values()), dtype=np.int64) - self.uniform, self.step)
            if not rest.any() and not levels.sum() and (levels >= self.low).all() and (levels <= self.high).all():
                return np.asarray(levels)
        raise UserError("the search to go on with was begun for other layers, another sparsity or other settings")


def evolve(
    layers: Sequence[LayerProfile],
    sparsity: float,
    settings: SearchSettings,
    measure: Measure,
    on_generation: Callable[[Search], None] | None = None,
    state: Search | None = None,
) -> Search:
    """Search from the uniform allocation, or go on from `state`, for all generations or until one would exceed tokens.

    Every allocation measured has exactly round(sparsity * weights) zeros, within bounds, and protected layers as they
    are. What happens in a generation depends on its number, the seed and its parent alone. A KL that is not finite
    counts as the worst. Also ends when there is no child left to try, as in a model with one layer. Raises
    ImpossiblePlan when bounds cannot meet the budget, UserError when `state` is another search's.
    """
    space = _make_space(layers, sparsity, settings)
    search = state or Search(zeros=space.zeros(np.zeros_like(space.uniform)))
    while search.generation < settings.generations:
        parent = space.levels(search.zeros)
        generator = np.random.default_rng([settings.seed, search.generation])
        children = _breed(parent, space, settings.children, generator)
        cost = settings.count_tokens(len(children))
        if not children or 0 < settings.tokens < search.tokens + cost:
            break
        best, kl = _select(parent, children, space, settings, measure, generator)
        search = Search(
            zeros=space.zeros(best),
            generation=search.generation + 1,
            tokens=search.tokens + cost,
            children=search.children + len(children),
            kl=kl if math.isfinite(kl) else None,
        )
        if on_generation:
            on_generation(search)
    return search


def _make_space(layers: Sequence[LayerProfile], sparsity: float, settings: SearchSettings) -> _Space:
    protect, limit = settings.protect, settings.max_layer_sparsity
    start = allocate(layers, sparsity, Recipe(allocation=UNIFORM), protect=protect, max_layer_sparsity=limit)
    uniform = np.array(list(start.zeros.values()), dtype=np.int64)
    least, most = find_bounds(layers, protect=protect, max_layer_sparsity=limit)
    step = max(1, round(settings.step * sum(layer.weights for layer in layers) / len(layers)))
    low = np.maximum(-MAX_LEVEL, -((uniform - least.astype(np.int64)) // step))
    high = np.minimum(MAX_LEVEL, (most.astype(np.int64) - uniform) // step)
    return _Space(list(start.zeros), uniform, step, low, high)


def _breed(parent: Levels, space: _Space, count: int, generator: np.random.Generator) -> list[Levels]:
    """Up to `count` children that differ from each other and from their parent."""
    children: list[Levels] = []
    seen = {parent.tobytes()}
    for _ in range(_TRIES * count):
        if len(children) == count:
            break
        child = _mutate(parent, space, generator)
        if child.tobytes() not in seen:
            seen.add(child.tobytes())
            children.append(child)
    return children


def _mutate(parent: Levels, space: _Space, generator: np.random.Generator) -> Levels:
    """The parent with min(U{1..3}, U{1..3}) times one layer a level down and another one up."""
    child = parent.copy()
    for _ in range(int(generator.integers(1, MAX_SWAPS + 1, size=2).min())):
        falling = np.flatnonzero(child > space.low)
        if not falling.size:
            break
        down = generator.choice(falling)
        rising = np.flatnonzero(child < space.high)
        rising = rising[rising != down]
        if not rising.size:
            break
        child[down] -= 1
        child[generator.choice(rising)] += 1
    return child


def _select(
    parent: Levels,
    children: list[Levels],
    space: _Space,
    settings: SearchSettings,
    measure: Measure,
    generator: np.random.Generator,
) -> tuple[Levels, float]:
    """(the best of parent and children, its KL on the windows of the last stage)."""
    candidates, best = children, math.inf
    for i, stage in enumerate(settings.stages):
        if i == len(settings.stages) - 1:
            candidates = [parent, *candidates]  # first, so that it stays unless a child is better
        windows = sorted(generator.choice(settings.windows, settings.count_windows(stage), replace=False).tolist())
        measured = measure([space.zeros(candidate) for candidate in candidates], windows)
        kls = [kl if math.isfinite(kl) else math.inf for kl in measured]
        order = sorted(range(len(candidates)), key=kls.__getitem__)[: stage.survivors]
        candidates, best = [candidates[place] for place in order], kls[order[0]]
    return candidates[0], best
