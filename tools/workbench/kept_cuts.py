"""How far the walks of a cut have come, in files that outlive the process: one that is killed goes on from there."""

from collections.abc import Callable, Mapping
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor

from billhook_kernels.channels import Elimination
from tools.models.unfinished import KeptFiles, forget_files
from tools.statistics.kept_passages import KeptStack
from tools.surgery.curves import Curves, CurveWalk
from tools.surgery.parts import KINDS

_COST = "cost/"


class CurveFiles:
    """As `tools.surgery.curves.KeptCurves`: at most so old as `KEEP_SECONDS`, or as the last block."""

    def __init__(self, directory: Path) -> None:
        """In a directory of this walk's own."""
        self._files, self._inputs = KeptFiles(directory), directory / "inputs"

    def begin_stack(self) -> KeptStack:
        """As in `KeptCurves`."""
        return KeptStack(self._inputs)

    def read(self) -> CurveWalk | None:
        """As in `KeptCurves`; None too where a file is gone or damaged."""
        found = self._files.read()
        if found is None:
            return None
        values, tensors = found
        stack = KeptStack(self._inputs, values["stack"])
        if not stack.is_whole:
            return None
        above = [tensors[f"above/{window}"] for window in range(values["windows"])]
        return CurveWalk(stack, values["left"], above, read_curves(tensors))

    def keep(self, walk: CurveWalk) -> None:
        """As in `KeptCurves`. Raises DiskFull."""
        assert isinstance(walk.inputs, KeptStack)
        if not self._files.are_due:
            return
        above = {f"above/{window}": gradient for window, gradient in enumerate(walk.above)}
        values = {"stack": walk.inputs.hashes, "left": walk.left, "windows": len(above)}
        self._files.replace(above | list_curves(walk.curves), **values)

    def forget(self) -> None:
        """All is done, and kept elsewhere."""
        forget_files(self._files.directory)


class FitFiles:
    """As `tools.measure.losses.KeptStates`, of the walk on which a cut is fitted, with what was made below."""

    def __init__(self, directory: Path, install: Callable[[Mapping[str, str]], bool]) -> None:
        """In a directory of this walk's own. `install` puts artifacts into the model, or tells that it cannot."""
        self._files, self._install = KeptFiles(directory), install
        self.made = dict[str, str]()
        """The artifacts of layers that were cut, by name."""
        self.units = dict[str, Tensor]()
        """Which units stay of their parts."""

    def read(self) -> tuple[int, Mapping[int, Tensor]] | None:
        """As in `KeptStates`, with what was made in the model; None too where a file is gone or damaged."""
        found = self._files.read()
        if found is None or not self._install(found[0]["made"]):
            return None
        values, tensors = found
        self.made, states = values["made"], {window: tensors[f"states/{window}"] for window in range(values["windows"])}
        self.units = {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith("units/")}
        return values["block"], states

    def keep(self, block: int, states: Mapping[int, Tensor]) -> None:
        """As in `KeptStates`. Raises DiskFull."""
        if block == 0 or not self._files.are_due:
            return
        tensors = {f"states/{window}": state for window, state in states.items()}
        tensors |= {f"units/{name}": units for name, units in self.units.items()}
        self._files.replace(tensors, block=block, windows=len(states), made=self.made)

    def forget(self) -> None:
        """All is done, and kept elsewhere."""
        forget_files(self._files.directory)


def list_orders(curves: Curves) -> dict[str, Tensor]:
    """The order in which units go, by a name of kind and block."""
    return {f"{kind}/{block}": x.order_R for kind, of_kind in curves.items() for block, x in enumerate(of_kind)}


def list_curves(curves: Curves) -> dict[str, Tensor]:
    """As `list_orders`, with what that costs."""
    costs = {f"{kind}/{block}": x.cost_R for kind, of_kind in curves.items() for block, x in enumerate(of_kind)}
    return list_orders(curves) | {f"{_COST}{name}": cost_R for name, cost_R in costs.items()}


def read_curves(tensors: Mapping[str, Tensor]) -> Curves:
    """What `list_curves` listed, or of `list_orders` without what it costs."""
    return {
        kind: [
            Elimination(tensors[name], tensors.get(f"{_COST}{name}", torch.empty(0)))
            for name in takewhile(tensors.__contains__, (f"{kind}/{block}" for block in count()))
        ]
        for kind in KINDS
    }
