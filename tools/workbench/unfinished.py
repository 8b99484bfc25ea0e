"""What is known of a walk through a text that is not finished, on disk: interrupted, it goes on from there.

The text has to pass the blocks again that were done, forward, and back where it was on its way back; but nothing that
layers read or pass back is summed, and no curve is measured, a second time. Of a model that is streamed it does not,
for how far it had come is kept as well. The result is the same to the bit.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.base.files import hash_file, write_whole
from tools.base.settings import TEAM, WorkbenchSettings
from tools.polish.loop import KEEP_SECONDS
from tools.statistics.gradients import Gradient
from tools.statistics.known import ModelStatistics, Way
from tools.statistics.passage import Passage
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


class UnfinishedPass:
    """What all windows passed on to a block of a streamed model, as `tools.measure.losses.KeptStates`: on disk, at most
    so old as that of a polish (`KEEP_SECONDS`), or as the last block."""

    def __init__(self, index: Index, key: Sequence[str], marks: Sequence[str]) -> None:
        """`key` says what the states depend on beside the weights, and `marks` names those before each block."""
        self._index, self._key, self._marks = index, ["unfinished pass", *key], marks
        self._kept = time.monotonic()

    def read(self) -> tuple[int, list[Tensor]] | None:
        """As in `KeptStates`; None too where they are of other weights."""
        found = self._index.read_replaced(self._key)
        if found is None or self._marks[found[0]["block"]] != found[0]["mark"]:
            return None
        return found[0]["block"], list(found[1]["states"])

    def keep(self, block: int, states: Sequence[Tensor]) -> None:
        """As in `KeptStates`."""
        if block < len(self._marks) and time.monotonic() - self._kept >= KEEP_SECONDS:
            self._index.replace_tensors(
                self._key, {"states": torch.stack([*states])}, block=block, mark=self._marks[block]
            )
            self._kept = time.monotonic()

    def forget(self) -> None:
        """All is done, and kept elsewhere."""
        self._index.forget_tensors(self._key)


class KeptStack:
    """As `tools.statistics.passage.Stack`, of files that outlive the process."""

    def __init__(self, directory: Path, hashes: Sequence[str] = ()) -> None:
        """The files in `directory` have these `hashes`, from the lowest up; without any it is emptied."""
        self._directory, self.hashes = directory, list(hashes)
        if not hashes:
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def height(self) -> int:
        """As in `Stack`."""
        return len(self.hashes)

    @property
    def is_whole(self) -> bool:
        """Whether all files are there, as they were written."""
        paths = [self._find(place) for place in range(self.height)]
        return all(path.is_file() for path in paths) and [*map(hash_file, paths)] == self.hashes

    def push(self, states: Sequence[Tensor]) -> None:
        """As in `Stack`. Raises DiskFull."""
        path = self._find(self.height)
        tensors = {str(place): state.detach().cpu().contiguous() for place, state in enumerate(states)}
        write_whole(path, partial(save_file, tensors))
        self.hashes.append(hash_file(path))

    def pop(self) -> list[Tensor]:
        """As in `Stack`. The file stays: what was kept last may stand above it."""
        self.hashes.pop()
        found = load_file(self._find(self.height))
        return [found[str(place)] for place in range(len(found))]

    def _find(self, place: int) -> Path:
        return self._directory / f"{place}.safetensors"


class UnfinishedPassages:
    """How far calibration text has come through a streamed model, as `tools.statistics.passage.KeptPassages`: on disk,
    at most so old as that of a polish (`KEEP_SECONDS`), or as the last block."""

    def __init__(self, index: Index, weights: Weights) -> None:
        self._index, self._weights, self._kept = index, weights, time.monotonic()

    def begin_stack(self, key: Sequence[str]) -> KeptStack:
        """As in `KeptPassages`."""
        return KeptStack(self._find_stack(key))

    def read(self, key: Sequence[str]) -> Passage | None:
        """As in `KeptPassages`; None too where a file of it is gone or damaged."""
        found = self._index.read_replaced(self._name(key))
        if found is None:
            return None
        values, tensors = found
        stack = None if values["stack"] is None else KeptStack(self._find_stack(key), values["stack"])
        if values["mark"] != self._mark(values["up"], values["down"]) or (stack and not stack.is_whole):
            return None
        passage = Passage({}, values["up"], stack, values["down"])
        for name in sorted(tensors):
            kind, window = name.split("/")[:2]
            if kind == "states":
                passage.states[int(window)] = tensors[name]
            else:
                gradient = Gradient(tensors[name], values["scales"][name])
                passage.above[int(window)] = (*passage.above.get(int(window), ()), gradient)
        return passage

    def keep(self, key: Sequence[str], passage: Passage) -> None:
        """As in `KeptPassages`, of weights that are whole."""
        if time.monotonic() - self._kept < KEEP_SECONDS or "" in self._weights.installed.values():
            return
        above = {
            f"above/{window}/{place}": gradient
            for window, gradients in passage.above.items()
            for place, gradient in enumerate(gradients)
        }
        states = {f"states/{window}": state for window, state in passage.states.items()}
        self._index.replace_tensors(
            self._name(key),
            states | {name: gradient.values for name, gradient in above.items()},
            up=passage.up,
            down=passage.down,
            mark=self._mark(passage.up, passage.down),
            scales={name: gradient.scale for name, gradient in above.items()},
            stack=passage.inputs.hashes if isinstance(passage.inputs, KeptStack) else None,
        )
        self._kept = time.monotonic()

    def forget(self, key: Sequence[str]) -> None:
        """As in `KeptPassages`."""
        self._index.forget_tensors(self._name(key))
        shutil.rmtree(self._find_stack(key), ignore_errors=True)

    def _name(self, key: Sequence[str]) -> list[str]:
        return ["unfinished passage", self._weights.hash_all_dense(), *key]

    def _find_stack(self, key: Sequence[str]) -> Path:
        name = hashlib.sha256(json.dumps(self._name(key)).encode()).hexdigest()
        return self._index.store.directory / f"passage-{name[:16]}"

    def _mark(self, up: int, down: int | None) -> str:
        """What names the weights that states depend on, or gradients, which do on those of all blocks."""
        marks = self._weights.mark_blocks(self._weights.installed)
        return marks[up] if down is None and up < len(marks) else json.dumps(self._weights.installed)


def name_dense(weights: Weights, settings: WorkbenchSettings, *without: str) -> list[str]:
    """What all that is known of the dense model depends on: it, and the settings but for some fields."""
    return [weights.hash_all_dense(), settings.model_dump_json(exclude={*TEAM, *without})]


def find_unfinished(
    index: Index, weights: Weights, settings: WorkbenchSettings, text: str, moments: dict[str, str], kind: str
) -> UnfinishedWalk:
    """What an earlier walk through a text left that was interrupted, by the same weights and settings."""
    key = [*name_dense(weights, settings), json.dumps(weights.installed), text, kind]
    return UnfinishedWalk(index, weights, key, moments)
