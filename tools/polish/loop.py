"""The steps of a polish: through the calibration text, measured on the windows held out, the best weights kept.

What was done is handed over after each pass, and a minute after it was last, or ten times as long as that took, so that
a polish that was killed ends with the same bits.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pydantic import BaseModel, Field

from tools.base.errors import BrokenPlan
from tools.base.files import KEEP_SECONDS
from tools.base.progress import FIGURES, Progress, Stopped, heed_stop
from tools.plans.polish import PATIENCE, Schedule
from tools.polish.gradients import KL
from tools.polish.optimisers import Optimiser, Step
from tools.polish.survivors import Survivors, Vectors
from tools.statistics.shards import Sums

KEEP_SHARE = 10
"""Times as long as it takes to hand over what was done, the polish goes on before it does so again: all survivors and
the means of their gradients are written, and read again for their hash."""


class Problem(Protocol):
    """What is made smaller, for the weights in the model (`tools.polish.gradients.Divergence`)."""

    def count_tokens(self, windows: Sequence[int]) -> int:
        """Tokens whose KL counts."""

    def measure(self, windows: Sequence[int]) -> float:
        """The mean KL, nats per token."""

    def differentiate(self, windows: Sequence[int]) -> Sums:
        """Sums of the KL and of its gradients by survivors."""


class Standing(BaseModel):
    """How far a polish is, in figures."""

    step: int = Field(0, description="Steps done.")
    trained: float = Field(0.0, description="Mean KL of the last step's windows before it was taken, nats per token.")
    held_out: list[float] = Field(
        [], description="KL of the windows held out, nats per token: before the first step, and at each measure since."
    )
    seconds: float = Field(0.0, description="Spent so far, over interruptions.")

    @property
    def best(self) -> int:
        """Number of the lowest measure, the first of equals; 0 where it was never better than before."""
        return self.held_out.index(min(self.held_out))


class Kept(NamedTuple):
    """A polish as it is kept."""

    standing: Standing
    tensors: dict[str, Vectors]
    """By what they are: `values`, `best`, and the optimiser's."""


class Keeper(Protocol):
    """Whoever keeps what was done, to go on from."""

    def read(self) -> Kept | None:
        """What was kept last; None where there is nothing, or it is not whole."""

    def keep(self, kept: Kept) -> None:
        """Keep this instead."""


@dataclass
class Polish:
    """One polish: the weights in the model change as it goes."""

    problem: Problem
    survivors: Survivors
    values: Vectors
    """Survivors before they are rounded to the model's number format; changed in place."""
    optimiser: Optimiser
    schedule: Schedule
    keeper: Keeper
    progress: Progress
    clock: Callable[[], float] = time.monotonic
    standing: Standing = field(default_factory=Standing)
    best: Vectors = field(default_factory=dict)
    """Survivors of the lowest measure, in the model's number format; empty until one was better than before."""

    def run(self) -> Standing:
        """Take all steps, or as many as make something better; afterwards `best` is what to keep.

        Raises Stopped between two windows, and BrokenPlan where a loss or a weight is not finite.
        """
        if (kept := self.keeper.read()) is not None:
            self._go_on(kept)
        began = kept_at = self.clock()
        earlier, rest = self.standing.seconds, float(KEEP_SECONDS)
        try:
            while self._measures_now() or not self._is_done():
                self._measure() if self._measures_now() else self._step()
                self.standing.seconds = earlier + self.clock() - began
                ended = self.standing.step in self.schedule.passes and not self._measures_now()
                if (ended or self.clock() - kept_at >= rest) and not self._is_done():
                    begun = self.clock()
                    self._keep()
                    kept_at = self.clock()
                    rest = max(KEEP_SECONDS, KEEP_SHARE * (kept_at - begun))
        except Stopped:
            self._keep()
            raise
        self._tell()
        return self.standing

    def _measures_now(self) -> bool:
        due = 1 + sum(step <= self.standing.step for step in self.schedule.measured)
        return len(self.standing.held_out) < due

    def _is_done(self) -> bool:
        stalled = len(self.standing.held_out) - 1 - self.standing.best >= PATIENCE
        return stalled or self.standing.step == len(self.schedule.steps)

    def _measure(self) -> None:
        self._tell()
        kl = self.problem.measure(self.schedule.held_out)
        if not math.isfinite(kl):
            raise BrokenPlan("polish: the loss on the windows held out is not finite")
        self.standing.held_out.append(kl)
        if 0 < self.standing.best == len(self.standing.held_out) - 1:
            self.best = {
                layer.name: self.values[layer.name].to(layer.weight_OI.dtype, copy=True)
                for layer in self.survivors.layers
            }

    def _step(self) -> None:
        heed_stop()
        self._tell()
        windows = self.schedule.steps[self.standing.step]
        sums, tokens = self.problem.differentiate(windows), self.problem.count_tokens(windows)
        trained = float(sums.pop(KL)) / tokens
        if not math.isfinite(trained):
            raise BrokenPlan("polish: the loss is not finite")
        gradients = {name: gradient_S.div_(tokens) for name, gradient_S in sums.items()}
        self.optimiser.take(self.values, gradients, Step(self.standing.step, len(self.schedule.steps)))
        self.survivors.write(self.values)
        self.standing.trained = trained
        self.standing.step += 1

    def _go_on(self, kept: Kept) -> None:
        self.standing, self.best = kept.standing, kept.tensors.get("best", {})
        for what, vectors in {"values": self.values, **self.optimiser.state}.items():
            for name, vector in vectors.items():
                vector.copy_(kept.tensors[what][name])
        self.survivors.write(self.values)

    def _keep(self) -> None:
        tensors = {"values": self.values, "best": self.best, **self.optimiser.state}
        self.keeper.keep(Kept(self.standing, tensors))

    def _tell(self) -> None:
        """How far it is, and behind the dot what changes from step to step."""
        at, steps = self.standing, self.schedule.steps
        figures = [f"KL {at.trained:.4f}"] if at.step else []
        figures += [f"held out {at.held_out[-1]:.4f}"] if at.held_out else []
        if at.step and at.seconds:
            done = self.problem.count_tokens([window for step in steps[: at.step] for window in step])
            figures.append(f"{done / at.seconds:,.0f} tokens/s")
        self.progress(FIGURES.join(["polish", *([", ".join(figures)] if figures else [])]), at.step, len(steps))
