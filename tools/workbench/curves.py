"""What an allocation needs of the layers beyond the profile: KL curves of a recipe's own method, spectra of weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tools.base.errors import explain_layer, explain_work
from tools.base.progress import Progress
from tools.models.layers import Layer
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.statistics.collect import measure_kappa
from tools.statistics.requests import Here, Parts
from tools.statistics.table import cut_to_levels, measure_alpha
from tools.team.requests import PruneToLevels
from tools.workbench.losses import Crew
from tools.workbench.profiles import Profiles
from tools.workbench.store import Index
from tools.workbench.unfinished import UnfinishedWalk
from tools.workbench.weights import Weights


class Curves:
    """Layers as allocations read them; what has to be measured is measured once."""

    def __init__(self, weights: Weights, profiles: Profiles, index: Index, crew: Crew) -> None:
        self._weights, self._profiles, self._index, self._crew = weights, profiles, index, crew

    @explain_work("measuring what a recipe needs to know of layers")
    def describe_layers(self, profile: str, recipe: Recipe, progress: Progress) -> list[LayerProfile]:
        """The layers of the recipe's profile, with what its allocation needs beyond: measured once, then read back.

        Raises ImpossiblePlan where there are no statistics as the recipe asks for.
        """
        self._profiles.refuse_statistics(recipe)
        profile = self._profiles.find(profile, recipe, progress)
        found: dict[str, dict[str, Any]] = {}
        if "alpha" in recipe.needs:
            found["alpha"] = self._index.measure_once(self._name_alpha(), lambda: self._measure_alphas(progress))
        if recipe.needs_curves:
            plain = recipe.for_curves()
            key = self._name_kappa(profile, plain)
            found["kappa"] = self._index.measure_once(key, lambda: self.measure_kappa(profile, plain, progress))
        return [
            layer.model_copy(update={field: each[layer.name] for field, each in found.items()})
            for layer in self._profiles.read(profile).layers
        ]

    @explain_work("measuring what a recipe needs to know of layers")
    def read_layers(self, profile: str, recipe: Recipe, progress: Progress) -> list[LayerProfile]:
        """As `describe_layers`, with KL curves that are known whatever the recipe's: no weight is touched.

        They are those of the mixture that it asks for, or of `profile` where its questions were never profiled.
        """
        self._profiles.refuse_statistics(recipe)
        known = self._profiles.find_known(profile, recipe)
        plain = recipe.model_copy(update={"curves": "mask", "mix": recipe.mix if known else ()})
        return self.describe_layers(profile, plain, progress)

    def has_layers(self, profile: str, recipe: Recipe) -> bool:
        """Whether `describe_layers` has only to read what was measured before: no weight is touched."""
        profile = self._profiles.find_known(profile, recipe)
        if not profile:
            return False
        keys = [self._name_alpha()] if "alpha" in recipe.needs else []
        if recipe.needs_curves:
            keys.append(self._name_kappa(profile, recipe.for_curves()))
        return all(self._index.read_measured(key) is not None for key in keys)

    def _name_alpha(self) -> list[str]:
        return ["alpha", self._weights.hash_all_dense()]

    def _name_kappa(self, profile: str, plain: Recipe) -> list[str]:
        """What KL curves depend on: the weights, the text and the labels drawn for it, as the statistics name them."""
        return ["kappa", self._weights.hash_all_dense(), self._profiles.read(profile).means, plain.mask_label]

    def _measure_alphas(self, progress: Progress) -> dict[str, float | None]:
        alphas, dense = {}, self._weights.dense
        for i, (name, dense_OI) in enumerate(dense.items()):
            progress("spectra", i, len(dense))
            with explain_layer(f"spectrum of layer {name}"):
                alphas[name] = measure_alpha(dense_OI.to(self._weights.device_of(name)))
        progress("spectra", len(dense), len(dense))
        return alphas

    def measure_kappa(self, profile: str, recipe: Recipe, progress: Progress) -> dict[str, list[float]]:
        """KL curves of what the recipe's method leaves of each layer."""
        stored, layers = self._profiles.read(profile), self._weights.layers
        walk = UnfinishedWalk(self._index, self._weights, self._name_kappa(profile, recipe))
        with self._find_moments(profile, recipe, progress) as hold:
            self._weights.restore_dense()
            parts = _Parts(self._weights, self._profiles, self._crew, profile, recipe, progress, hold)
            kappa = measure_kappa(
                *(self._crew.team, self._crew.extent, layers, progress, parts.of_block, stored.calibration, walk),
                stored.shares,
            )
        walk.forget()
        self._profiles.let_go()
        progress(parts.label, len(layers), len(layers))
        return kappa

    def _find_moments(
        self, profile: str, recipe: Recipe, progress: Progress
    ) -> AbstractContextManager[Callable[[int], None]]:
        """What sees to it that the second moments of a block can be found, if the recipe's method needs any."""
        if not recipe.changes_survivors:
            return nullcontext(lambda block: None)
        return self._profiles.pass_moments(profile, progress, down=True)


@dataclass
class _Parts:
    """What a recipe's method changes of the layers of one block after another, and how far that is."""

    weights: Weights
    profiles: Profiles
    crew: Crew
    profile: str
    recipe: Recipe
    progress: Progress
    hold: Callable[[int], None]
    """As `SecondMoments.pass_blocks` gives it."""
    done: int = 0
    """Layers."""

    def of_block(self, layers: Sequence[Layer]) -> Parts:
        """By the workers where there are some, else when they are asked for."""
        names = [layer.name for layer in layers]
        if layers:
            self.hold(layers[0].block)
        cluster = self.crew.cluster
        if cluster is None:
            return [Here({name: self._of_layer(name) for name in names})]
        groups = self.profiles.list_work(cluster, dict.fromkeys(names, 0), self.profile, self.recipe)
        kept = list(cluster.hand_out_and_keep(PruneToLevels(self.recipe, group) for group in groups))
        self.done += len(names)
        self._tell()
        return kept

    def _of_layer(self, name: str) -> Iterator[Tensor]:
        self._tell()
        self.done += 1
        dense_OI = self.weights.dense[name].to(self.weights.device_of(name))
        yield from cut_to_levels(self.recipe, dense_OI, self.profiles.find_statistics(self.profile, name, self.recipe))

    @property
    def label(self) -> str:
        """What is going on."""
        return f"KL curves of {self.recipe.mask_label}"

    def _tell(self) -> None:
        self.progress(self.label, self.done, len(self.weights.layers))
