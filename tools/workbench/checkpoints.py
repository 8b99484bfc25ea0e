"""Checkpoints: for every layer its artifact, and what it was made by."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel

from tools.models.artifacts import FORMAT
from tools.plans.cuts import CutOrder
from tools.plans.recipe import Recipe


class LayerTask(NamedTuple):
    """What is to become of one layer, and by which statistics."""

    zeros: int
    recipe: Recipe
    """`Recipe.within_layers`."""
    profile: str


class LayerRecord(BaseModel):
    """One layer of a checkpoint: where its weights lie, and how many of them were to go."""

    artifact: str
    zeros: int
    recipe: Recipe | None = None
    """Left out where it is the checkpoint's."""
    profile: str | None = None
    """The same."""


class Checkpoint(BaseModel):
    """A manifest: the weights of all layers, and how they were made, to make them again."""

    profile: str
    recipe: Recipe
    """What most layers were made by."""
    layers: dict[str, LayerRecord]
    polish: int | None = None
    """Tokens that all layers together were polished on afterwards; left out where they were not."""
    cut: CutOrder | None = None
    """The parts that went; left out where weights were pruned one by one."""
    units: str | None = None
    """Artifact of the units that stay, where parts went."""

    @property
    def tasks(self) -> dict[str, LayerTask]:
        """What every layer was made by."""
        return {
            name: LayerTask(record.zeros, record.recipe or self.recipe, record.profile or self.profile)
            for name, record in self.layers.items()
        }


def make_checkpoint(tasks: Mapping[str, LayerTask], artifacts: Mapping[str, str], polish: int = 0) -> Checkpoint:
    """The manifest of layers that were made by `tasks`, and polished on so many tokens."""
    shared = Counter((task.recipe, task.profile) for task in tasks.values()).most_common(1)
    recipe, profile = shared[0][0]
    layers = {
        name: LayerRecord(
            artifact=artifacts[name],
            zeros=task.zeros,
            recipe=None if task.recipe == recipe else task.recipe,
            profile=None if task.profile == profile else task.profile,
        )
        for name, task in tasks.items()
    }
    return Checkpoint(profile=profile, recipe=recipe, layers=layers, polish=polish or None)


def make_layer_key(name: str, dense: str, statistics: str, task: LayerTask, below: Sequence[str] = ()) -> str:
    """What a pruned layer's artifact depends on, whatever profile it is pruned for.

    `dense` is the hash of its dense weights, `statistics` the artifact of those it is pruned by, `below` are the
    artifacts of the layers that its inputs passed through.
    """
    parts = [FORMAT, name, dense, statistics, task.zeros, task.recipe.mask_label, task.recipe.pattern, *below]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
