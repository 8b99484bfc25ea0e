"""How pruned layers come to the workers: only those that changed, and each once for all who need it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from tools.statistics.requests import Here, Kept
from tools.team.places import Place, Reference, keep
from tools.team.requests import Install
from tools.team.worker import StoredLayer

Weights = Mapping[str, str]
"""What a whole model's prunable weights are: the artifact of each layer, by its name."""


def name_weights(changed: Weights) -> str:
    """A name for a model's weights: "" as it was loaded, else a hash of the layers that are others, and of what."""
    return hashlib.sha256(json.dumps(sorted(changed.items())).encode()).hexdigest() if changed else ""


class WeightSource(Protocol):
    """Where the workers' models get their weights from."""

    @property
    def installed(self) -> Weights:
        """The weights as they are in this process: the workers' own, unless a request is about others."""

    @property
    def dense(self) -> Mapping[str, Tensor]:
        """The weights of each layer as it was loaded, (O, I)."""

    def read_artifact(self, name: str, artifact: str) -> dict[str, Tensor]:
        """A layer's mask, and its values and bias unless they are the dense ones. Raises DamagedArtifact."""

    def mark_blocks(self, weights: Weights) -> list[str]:
        """For each block, a name of the weights of all blocks before it."""

    def hash_all_dense(self) -> str:
        """What names the weights as they were loaded."""


class Carrier:
    """What is in the object store of the weights of one model."""

    def __init__(self, ray: Any, source: WeightSource) -> None:
        """The weights in this process are as the model was loaded."""
        self._ray, self._source = ray, source
        self._loaded = dict(source.installed)
        self._dense: dict[str, Reference[Tensor]] = {}
        self._stored: dict[tuple[str, str], Reference[StoredLayer]] = {}
        self.coming: list[Weights] = []
        """Those of jobs that no worker has yet, the last one's first."""

    def keep_dense(self, name: str) -> Reference[Tensor]:
        """A layer's dense weights where all workers can read them, once for the whole run."""
        if name not in self._dense:
            self._dense[name] = keep(self._ray, self._source.dense[name])
        return self._dense[name]

    def update(self, place: Place, weights: Weights | None) -> str:
        """Give a worker the layers of these weights, or of those in this process, that are other than those it has.

        The name that its weights then have: whether it has them, it says with every answer.
        """
        weights = self._source.installed if weights is None else weights
        wanted = {name: artifact for name, artifact in weights.items() if artifact != self._loaded[name]}
        changed = [name for name in self._loaded if wanted.get(name) != place.installed.get(name)]
        name = name_weights(wanted)
        if not changed:
            return name
        found = {layer: self._find(layer, weights[layer]) for layer in changed}
        install = Install(name, found, self._source.mark_blocks(weights))
        place.sent = place.actor.call.remote(keep(self._ray, install).ref, None)
        place.installed = wanted
        self._forget()
        return name

    def _find(self, name: str, artifact: str) -> Kept[StoredLayer]:
        if artifact == self._loaded[name]:
            return Here(StoredLayer({}, self.keep_dense(name)))
        key = name, artifact
        if key not in self._stored:
            tensors = self._source.read_artifact(name, artifact)
            # the dense weights are there once, whatever masks they are given
            dense_OI = None if "values" in tensors else self.keep_dense(name)
            self._stored[key] = keep(self._ray, StoredLayer(tensors, dense_OI))
        return self._stored[key]

    def _forget(self) -> None:
        """What others may still need is kept: the weights in this process and those of coming jobs."""
        needed = [self._source.installed, *self.coming]
        for name, artifact in list(self._stored):
            if all(weights[name] != artifact for weights in needed):
                del self._stored[name, artifact]
