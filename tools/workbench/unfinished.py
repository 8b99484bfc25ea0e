"""What is known of a walk through a text that is not finished, on disk: interrupted, it goes on from there.

The text has to pass the blocks again that were done, forward, and back where it was on its way back; but nothing that
layers read or pass back is summed, and no curve is measured, a second time. Of a model that is streamed it does not,
for how far it had come is kept as well. The result is the same to the bit.
"""

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from tools.base.settings import TEAM, Calibration, WorkbenchSettings
from tools.plans.layer_profile import LayerProfile
from tools.results.losses import Evaluation
from tools.statistics.known import PRIOR, ModelStatistics, Way
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.weights import Weights

Kind = Literal["full", "passed", "masks"]
"""Whether a profile is made with second moments, and keeps them; without keeping them; or with mean squares alone."""


class TextPart(BaseModel):
    """What one of the named texts says of the layers, by itself."""

    means: str
    """Artifact, as in `StoredProfile`."""
    moments: dict[str, str]
    """As in `StoredProfile`."""
    group: dict[str, str]
    gradient: dict[str, float]
    kappa: dict[str, list[float]]
    """About the masks of the run's own mixture."""
    few: dict[str, int] = {}


class StoredProfile(BaseModel):
    """What `Profiles.make` leaves on disk."""

    layers: list[LayerProfile]
    means: str
    moments: dict[str, str]
    """Artifact of the second moment of each group of layers; empty until a recipe needs them, where they are not kept,
    and of several texts."""
    passed: bool = Field(False, exclude_if=operator.not_)
    """Whether second moments were made with it that were not kept: its mean squares are their diagonals."""
    group: dict[str, str]
    hidden: str
    dense: Evaluation
    calibration: Calibration = "run"
    """The text that it is about."""
    first: str = Field("", exclude_if=operator.not_)
    """The profile of the dense model, where this is one of other weights."""
    few: dict[str, int] = {}
    """Layers of experts that were sent too few of its tokens (`tools.statistics.experts`), with their number."""
    mix: dict[str, float] = Field({}, exclude_if=operator.not_)
    """What each text of several counts in it, in their order and in sum 1; empty where there is one."""
    parts: dict[str, TextPart] = Field({}, exclude_if=operator.not_)
    """Each of these texts by itself."""

    @property
    def shares(self) -> tuple[float, ...]:
        """`mix`, as a walk has it."""
        return tuple(self.mix.values())

    @property
    def masks_only(self) -> bool:
        """Whether it was made without second moments, be they kept or not."""
        return not (self.passed or self.moments or any(part.moments for part in self.parts.values()))

    def sort_texts(self, names: Sequence[str]) -> "StoredProfile":
        """The same with its texts in this order, which is that of their windows: on disk they stand by their names."""
        texts = [name for name in names if name in self.mix]
        mix, parts = {name: self.mix[name] for name in texts}, {name: self.parts[name] for name in texts}
        return self.model_copy(update={"mix": mix, "parts": parts})

    def only(self, text: str) -> dict[str, float]:
        """The mixture that is one of the texts alone."""
        return {name: float(name == text) for name in self.mix}


def write_means(store: ArtifactStore, statistics: ModelStatistics) -> str:
    """The vectors of all layers as an artifact."""
    means = {f"a/{name}": value for name, value in statistics.mean_square.items()}
    means |= {f"plain/{name}": value for name, value in statistics.gradient_square.items()}
    means |= {f"clipped/{name}": value for name, value in statistics.clipped_square.items()}
    return store.write_tensors(means)


def keep_part(store: ArtifactStore, statistics: ModelStatistics, moments: Mapping[str, str]) -> TextPart:
    """What was collected of one text."""
    return TextPart(
        means=write_means(store, statistics),
        moments=dict(moments),
        group=statistics.group,
        gradient=statistics.gradient,
        kappa=statistics.kappa,
        few=statistics.few,
    )


def has_parts(store: ArtifactStore, parts: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all artifacts of kept parts are there and whole."""
    found = [TextPart.model_validate(part) for part in parts.values()]
    return all(store.has(x, ".safetensors") for part in found for x in [part.means, *part.moments.values()])


def read_part(store: ArtifactStore, part: TextPart, device_of: Callable[[str], torch.device]) -> ModelStatistics:
    """What was kept of one text, on the device of each layer. Raises DamagedArtifact."""
    found = ModelStatistics({}, {}, {}, part.group, part.gradient, part.kappa, part.few)
    fields = {"a": found.mean_square, "plain": found.gradient_square, "clipped": found.clipped_square}
    for path, vector in store.read_tensors(part.means).items():
        kind, _, name = path.partition("/")
        fields[kind][name] = vector.to(device_of(name))
    return found


class UnfinishedWalk:
    """As `tools.statistics.known.KeptBlocks`."""

    def __init__(
        self, index: Index, weights: Weights, key: Sequence[str], moments: dict[str, str] | None = None
    ) -> None:
        """`key` says what the statistics depend on; `moments` are the artifacts of the second moments so far."""
        self._store, self._index, self._weights = index.store, index, weights
        self._key, self._moments = ["unfinished", *key], {} if moments is None else moments
        self._passed: list[tuple[list[str], str]] = []
        """Of the blocks that were read or kept: the key, and the artifact of vectors."""

    def read(self, way: Way, block: int) -> ModelStatistics | None:
        """As in `KeptBlocks`; None too where a file of it is gone or damaged."""
        key = [*self._key, way, str(block)]
        found = self._index.read_measured(key)
        if found is None:
            return None
        if not all(self._store.has(x, ".safetensors") for x in [found["vectors"], *found["moments"].values()]):
            return None
        part = ModelStatistics(**found["values"])
        for path, vector in self._store.read_tensors(found["vectors"]).items():
            field, _, name = path.partition("/")
            getattr(part, field)[name] = vector.to(self._weights.device_of(name))
        self._moments |= found["moments"]
        self._passed.append((key, found["vectors"]))
        return part

    def keep(self, way: Way, block: int, part: ModelStatistics) -> None:
        """As in `KeptBlocks`. What is not finite, and will be refused, is not kept."""
        if not all(
            map(math.isfinite, [*part.gradient.values(), *(kl for curve in part.kappa.values() for kl in curve)])
        ):
            return
        vectors: dict[str, Tensor] = {}
        values: dict[str, dict[str, object]] = {}
        for field in fields(part):
            known = getattr(part, field.name)
            vectors |= {f"{field.name}/{name}": value for name, value in known.items() if isinstance(value, Tensor)}
            values[field.name] = {name: value for name, value in known.items() if not isinstance(value, Tensor)}
        moments = {leader: self._moments[leader] for leader in part.group.values() if leader in self._moments}
        key, artifact = [*self._key, way, str(block)], self._store.write_tensors(vectors)
        self._index.keep_measured(key, {"vectors": artifact, "values": values, "moments": moments})
        self._passed.append((key, artifact))

    def forget(self) -> None:
        """All is done, and kept elsewhere."""
        for key, artifact in self._passed:
            self._index.forget_measured(key)
            self._store.path(artifact, ".safetensors").unlink(missing_ok=True)


def name_dense(weights: Weights, settings: WorkbenchSettings, *without: str) -> list[str]:
    """What all that is known of the dense model depends on: it, and the settings but for some fields."""
    return [weights.hash_all_dense(), settings.model_dump_json(exclude={*TEAM, *without})]


def name_statistics(weights: Weights, settings: WorkbenchSettings, *without: str) -> list[str]:
    """As `name_dense`, of statistics, which hang on how gamma is made as well."""
    return [*name_dense(weights, settings, *without), f"prior of {PRIOR} tokens"]


def find_unfinished(
    index: Index, weights: Weights, settings: WorkbenchSettings, text: str, moments: dict[str, str], kind: str
) -> UnfinishedWalk:
    """What an earlier walk through a text left that was interrupted, by the same weights and settings."""
    key = [*name_statistics(weights, settings), json.dumps(weights.installed), text, kind]
    return UnfinishedWalk(index, weights, key, moments)
