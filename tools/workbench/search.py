"""The evolutionary search on a workbench: the allocation that costs least KL where it is carried out and measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel

from tools.base.files import write_json
from tools.plans.allocate import Allocation, describe_zeros
from tools.plans.evolve import Search, SearchSettings, Stage, evolve
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench

CHILDREN = 8
STAGES = (Stage(2, 1), Stage(1, 4))
"""The search's generations: small ones, so that a budget of a laptop's size holds several."""


class SavedSearch(BaseModel):
    """Where the evolutionary search of a row stands, and what it is about: another one never goes on from it."""

    profile: str
    settings: SearchSettings
    search: Search
    seconds: float


class Decision(NamedTuple):
    """How much of each layer goes, and what it took to find out."""

    allocation: Allocation
    tokens: int
    seconds: float


def search_allocation(
    bench: "Workbench",
    profile: str,
    recipe: Recipe,
    sparsity: float,
    progress: "Progress",
    *,
    tokens: int,
    max_layer_sparsity: float,
) -> Decision:
    """Search for what the recipe does within layers, from its allocation, which is uniform; saved after each
    generation, and gone on with where one of the same profile and settings was saved.

    `tokens` of the calibration text may be put through pruned models. Raises ImpossiblePlan.
    """
    began = time.monotonic()
    layers = bench.describe_layers(profile, recipe, progress)
    rules = SearchSettings(
        children=CHILDREN,
        stages=list(STAGES),
        window=bench.settings.window,
        windows=min(bench.settings.gradient_windows, bench.settings.calibration_windows),
        tokens=tokens,
        seed=bench.settings.seed,
        max_layer_sparsity=max_layer_sparsity,
    )
    path = bench.directory / f"search-{recipe.mask_label}-{sparsity}.json"
    saved = _read_search(path, profile, rules, bench.warn)
    earlier, done = (saved.seconds, saved.search.tokens) if saved else (0.0, 0)
    running = _Running(bench, profile, recipe, layers, rules, path, progress, began - earlier, done)
    found = evolve(layers, sparsity, rules, running.measure, running.keep, saved.search if saved else None)
    return Decision(describe_zeros(layers, found.zeros), found.tokens, running.seconds)


@dataclass
class _Running:
    """A search under way."""

    bench: "Workbench"
    profile: str
    recipe: Recipe
    layers: Sequence[LayerProfile]
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
        self.progress(f"evolution for {self.recipe.mask_label}, tokens", self.tokens, self.rules.tokens)
        orders = [order_allocation(self.recipe, describe_zeros(self.layers, zeros)) for zeros in candidates]
        checkpoints = [self.bench.prune(self.profile, order, lambda *_: None) for order in orders]
        self.tokens += len(candidates) * len(windows) * self.rules.window
        return self.bench.measure_kl_each(checkpoints, windows)

    def keep(self, search: Search) -> None:
        """To go on from, should it be interrupted."""
        saved = SavedSearch(profile=self.profile, settings=self.rules, search=search, seconds=self.seconds)
        write_json(self.path, saved.model_dump())


def _read_search(path: Path, profile: str, rules: SearchSettings, warn: Callable[[str], None]) -> SavedSearch | None:
    """The search to go on with; None where there is none of the same profile and settings."""
    if not path.is_file():
        return None
    try:
        saved = SavedSearch.model_validate_json(path.read_bytes())
    except ValueError:
        warn(f"{path} is damaged; the search begins anew")
        return None
    return saved if (saved.profile, saved.settings) == (profile, rules) else None
