"""What all windows passed on to a block of a streamed model, in files that outlive the process."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tools.models.unfinished import UNFINISHED, KeptFiles, Marks, forget_all
from tools.models.window_states import stack_states

_PREFIX = "pass-"


class StateFiles:
    """As `tools.measure.losses.KeptStates`: at most so old as `KEEP_SECONDS`, or as the last block."""

    def __init__(self, run: Path, dense: str, windows_BT: Tensor, marks: Marks) -> None:
        """In the directory of a run. `dense` names the dense model, and `marks` the weights that windows pass."""
        windows = hashlib.sha256(windows_BT.cpu().numpy().tobytes()).hexdigest()
        name = hashlib.sha256(f"{dense} {windows}".encode()).hexdigest()[:16]
        self._files, self._marks = KeptFiles(run / UNFINISHED / f"{_PREFIX}{name}"), marks

    def read(self) -> tuple[int, Mapping[int, Tensor]] | None:
        """As in `KeptStates`; None too where they are of other weights, or a file is gone or damaged."""
        found = self._files.read()
        if found is None or self._marks.below[found[0]["block"]] != found[0]["mark"]:
            return None
        states_BTD = found[1]["states"]
        return found[0]["block"], dict(enumerate(states_BTD.split(1)))

    def keep(self, block: int, states: Mapping[int, Tensor]) -> None:
        """As in `KeptStates`. Raises DiskFull."""
        if block < len(self._marks.below) and self._files.are_due:
            self._files.replace({"states": stack_states(states)}, block=block, mark=self._marks.below[block])


def forget_states(run: Path) -> None:
    """All is done, and kept elsewhere, by whatever processes."""
    forget_all(run, _PREFIX)
