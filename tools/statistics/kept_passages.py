"""How far calibration text has come through a streamed model, in files that outlive the process.

Each process that walks has them, the one of a run and workers on its machine, in one directory: a walk that is killed
goes on where each of them was.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.base.files import KEEP_SECONDS, hash_file, write_whole
from tools.models.unfinished import UNFINISHED, KeptFiles, Marks, forget_all, forget_files
from tools.statistics.gradients import Gradient
from tools.statistics.passage import Passage

_PREFIX = "walk-"


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
        found, marks = KeptFiles(self._find(key)).read(), self._mark()
        if found is None or marks is None:
            return None
        values, tensors = found
        stack = None if values["stack"] is None else KeptStack(self._find(key) / "inputs", values["stack"])
        if values["mark"] != _find_mark(marks, values["up"], values["down"]) or (stack and not stack.is_whole):
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
        """As in `KeptPassages`. Raises DiskFull."""
        if time.monotonic() - self._kept < KEEP_SECONDS or (marks := self._mark()) is None:
            return
        above = {
            f"above/{window}/{place}": gradient
            for window, gradients in passage.above.items()
            for place, gradient in enumerate(gradients)
        }
        states = {f"states/{window}": state for window, state in passage.states.items()}
        KeptFiles(self._find(key)).replace(
            states | {name: gradient.values for name, gradient in above.items()},
            up=passage.up,
            down=passage.down,
            mark=_find_mark(marks, passage.up, passage.down),
            scales={name: gradient.scale for name, gradient in above.items()},
            stack=passage.inputs.hashes if isinstance(passage.inputs, KeptStack) else None,
        )
        self._kept = time.monotonic()

    def forget(self, key: Sequence[str]) -> None:
        """As in `KeptPassages`: with what others kept of other spans of the walk, which is over for all."""
        forget_files(self._find(key).parent)

    def _find(self, key: Sequence[str]) -> Path:
        """One for each span of a walk, of which the last of the key tells."""
        *walk, span = key
        name = hashlib.sha256(json.dumps([self._name_dense(), *walk]).encode()).hexdigest()
        return self._directory / f"{_PREFIX}{name[:16]}" / span


def forget_walks(run: Path) -> None:
    """What was kept of all walks in the directory of a run is of no more use."""
    forget_all(run, _PREFIX)


def _find_mark(marks: Marks, up: int, down: int | None) -> str:
    """What names the weights that states depend on, or gradients, which do on those of all blocks."""
    return marks.below[up] if down is None and up < len(marks.below) else marks.every
