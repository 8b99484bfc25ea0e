"""The evolutionary search on a workbench: the allocation that costs least KL where it is carried out and measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel

from tools.base.files import write_json
from tools.base.rows import read_search
from tools.plans.allocate import Allocation, describe_zeros
from tools.plans.evolve import EffortName, Search, SearchSettings, evolve, follow_effort
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench


class SavedSearch(BaseModel):
    """Where the evolutionary search of a row stands, and what it is about: another one never goes on from it."""

    profile: str
    settings: SearchSettings
    search: Search
    seconds: float


class Searched(NamedTuple):
    """How long an evolutionary search was."""

    generations: int
    planned: int
    """Generations of the setting, which the tokens may not allow."""
    children: int
    """In each generation; a small model may not have as many different ones."""
    measured: int
    """Children, over all generations."""


class Decision(NamedTuple):
    """How much of each layer goes, and what it took to find out."""

    allocation: Allocation
    tokens: int
    seconds: float
    searched: Searched | None = None


def search_allocation(
    bench: "Workbench",
    profile: str,
    recipe: Recipe,
    sparsity: float,
    progress: "Progress",
    *,
    effort: EffortName = "fast",
    tokens: int,
    max_layer_sparsity: float,
) -> Decision:
    """Search for what the recipe does within layers, from its allocation, which is uniform; saved after each
    generation, and gone on with where one of the same profile and settings was saved.

    At most `tokens` of the calibration text are put through pruned models; 0: as many as the setting takes. Warns where
    there is less text than that selects on. Raises ImpossiblePlan.
    """
    began = time.monotonic()
    layers, fitted = bench.curves.describe_layers(profile, recipe, progress), bench.list_fitted()
    rules = follow_effort(
        effort,
        window=bench.settings.window,
        windows=len(fitted),
        tokens=tokens,
        seed=bench.settings.seed,
        max_layer_sparsity=max_layer_sparsity,
    )
    if (text := rules.windows * rules.window) < rules.stages[-1].tokens:
        bench.warn(
            f"{recipe.mask_label}:evolution selects on all of the {text:,} calibration tokens, where EvoPress has "
            f"{rules.stages[-1].tokens:,}; give more --calibration-windows"
        )
    path = bench.directory / f"search-{recipe.mask_label}-{sparsity}.json"
    saved = _read_search(path, profile, rules, bench.warn)
    earlier, done = (saved.seconds, saved.search.tokens) if saved else (0.0, 0)
    running = _Running(bench, profile, recipe, layers, fitted, rules, path, progress, began - earlier, done)
    found = evolve(layers, sparsity, rules, running.measure, running.keep, saved.search if saved else None)
    searched = Searched(found.generation, rules.generations, rules.children, found.children)
    return Decision(describe_zeros(layers, found.zeros), found.tokens, running.seconds, searched)


@dataclass
class _Running:
    """A search under way."""

    bench: "Workbench"
    profile: str
    recipe: Recipe
    layers: Sequence[LayerProfile]
    fitted: Sequence[int]
    """The calibration windows that it selects on, those whose texts count."""
    rules: SearchSettings
    path: Path
    progress: "Progress"
    began: float
    """As if it had never been interrupted."""
    tokens: int
    """Put through pruned models so far."""

    @property
    def seconds(self) -> float:
        """Of the whole search, over interruptions."""
        return time.monotonic() - self.began

    def measure(self, candidates: list[dict[str, int]], windows: list[int]) -> list[float]:
        """As `tools.plans.evolve.Measure`."""
        self.progress(f"evolution for {self.recipe.mask_label}, tokens", self.tokens, self.rules.planned_tokens)
        orders = [order_allocation(self.recipe, describe_zeros(self.layers, zeros)) for zeros in candidates]
        checkpoints = [self.bench.pruner.prune(self.profile, order, lambda *_: None) for order in orders]
        self.tokens += len(candidates) * len(windows) * self.rules.window
        return self.bench.evaluator.measure_kl_each(checkpoints, [self.fitted[window] for window in windows])

    def keep(self, search: Search) -> None:
        """To go on from, should it be interrupted."""
        saved = SavedSearch(profile=self.profile, settings=self.rules, search=search, seconds=self.seconds)
        write_json(self.path, saved.model_dump())


def _read_search(path: Path, profile: str, rules: SearchSettings, warn: Callable[[str], None]) -> SavedSearch | None:
    """The search to go on with; None where there is none of the same profile and settings."""
    saved = read_search(path, SavedSearch, warn)
    return saved if saved and (saved.profile, saved.settings) == (profile, rules) else None
