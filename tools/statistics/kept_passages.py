"""How far calibration text has come through a streamed model, in files that outlive the process.

Each process that walks has them, the one of a run and workers on its machine, in one directory: a walk that is killed
goes on where each of them was.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.base.files import KEEP_SECONDS, hash_file, write_text, write_whole
from tools.statistics.gradients import Gradient
from tools.statistics.passage import Passage

UNFINISHED = "unfinished"
"""The directory within a run's, while there is anything in it."""


class Marks(NamedTuple):
    """Names of the weights in a model."""

    below: Sequence[str]
    """For each block, those of all blocks before it."""
    every: str
    """Those of all blocks."""

    def find(self, up: int, down: int | None) -> str:
        """Those that states depend on, or gradients, which do on those of all blocks."""
        return self.below[up] if down is None and up < len(self.below) else self.every


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


class PassageFiles:
    """As `tools.statistics.passage.KeptPassages`: at most so old as `KEEP_SECONDS`, or as the last block."""

    def __init__(self, directory: Path, name_dense: Callable[[], str], mark: Callable[[], Marks | None]) -> None:
        """Within `directory`. `name_dense` names the dense model, `mark` the weights that are in it; nothing is kept of
        any that it names none of."""
        self._directory, self._name_dense, self._mark = directory / UNFINISHED, name_dense, mark
        self._kept = time.monotonic()

    def begin_stack(self, key: Sequence[str]) -> KeptStack:
        """As in `KeptPassages`."""
        return KeptStack(self._find(key) / "inputs")

    def read(self, key: Sequence[str]) -> Passage | None:
        """As in `KeptPassages`; None too where a file of it is gone or damaged."""
        values, marks = self._read_values(key), self._mark()
        if values is None or marks is None or values["mark"] != marks.find(values["up"], values["down"]):
            return None
        path = self._find(key) / values["tensors"]
        stack = None if values["stack"] is None else KeptStack(self._find(key) / "inputs", values["stack"])
        if not path.is_file() or hash_file(path) != path.stem or (stack and not stack.is_whole):
            return None
        passage, tensors = Passage({}, values["up"], stack, values["down"]), load_file(path)
        for name in sorted(tensors):
            kind, window = name.split("/")[:2]
            if kind == "states":
                passage.states[int(window)] = tensors[name]
            else:
                gradient = Gradient(tensors[name], values["scales"][name])
                passage.above[int(window)] = (*passage.above.get(int(window), ()), gradient)
        return passage

    def keep(self, key: Sequence[str], passage: Passage) -> None:
        """As in `KeptPassages`. Raises DiskFull."""
        if time.monotonic() - self._kept < KEEP_SECONDS or (marks := self._mark()) is None:
            return
        above = {
            f"above/{window}/{place}": gradient
            for window, gradients in passage.above.items()
            for place, gradient in enumerate(gradients)
        }
        tensors = {f"states/{window}": state for window, state in passage.states.items()}
        tensors |= {name: gradient.values for name, gradient in above.items()}
        before, directory = self._read_values(key), self._find(key)
        made = directory / "passage.safetensors"
        write_whole(made, partial(save_file, {name: x.detach().contiguous() for name, x in tensors.items()}))
        path = made.rename(directory / f"{hash_file(made)}.safetensors")
        values = {
            "tensors": path.name,
            "up": passage.up,
            "down": passage.down,
            "mark": marks.find(passage.up, passage.down),
            "scales": {name: gradient.scale for name, gradient in above.items()},
            "stack": passage.inputs.hashes if isinstance(passage.inputs, KeptStack) else None,
        }
        write_text(directory / "passage.json", json.dumps(values))
        if before is not None and before["tensors"] != path.name:
            (directory / before["tensors"]).unlink(missing_ok=True)
        self._kept = time.monotonic()

    def forget(self, key: Sequence[str]) -> None:
        """As in `KeptPassages`: with what others kept of other spans of the walk, which is over for all."""
        shutil.rmtree(self._find(key).parent, ignore_errors=True)
        with suppress(OSError):  # where other walks are under way
            self._directory.rmdir()

    def _read_values(self, key: Sequence[str]) -> dict[str, Any] | None:
        path = self._find(key) / "passage.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _find(self, key: Sequence[str]) -> Path:
        """One for each span of a walk, of which the last of the key tells."""
        *walk, span = key
        name = hashlib.sha256(json.dumps([self._name_dense(), *walk]).encode()).hexdigest()
        return self._directory / name[:16] / span
