"""What a profile leaves on disk, and what each of several named texts says in it, of which any mixture is a sum."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field

from tools.base.settings import Calibration
from tools.plans.layer_profile import LayerProfile
from tools.results.losses import Evaluation
from tools.statistics.known import ModelStatistics
from tools.workbench.store import ArtifactStore

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
