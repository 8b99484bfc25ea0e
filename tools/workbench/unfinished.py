"""What is known of a walk through a text that is not finished, on disk: interrupted, it goes on from there.

The text has to pass the blocks again that were done, forward, and back where it was on its way back; but nothing that
layers read or pass back is summed, and no curve is measured, a second time. Of a model that is streamed it does not,
for how far it had come is kept as well. The result is the same to the bit.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import fields

from torch import Tensor

from tools.base.settings import TEAM, WorkbenchSettings
from tools.statistics.known import PRIOR, ModelStatistics, Way
from tools.workbench.store import Index
from tools.workbench.weights import Weights


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
