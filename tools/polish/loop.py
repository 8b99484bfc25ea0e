"""The steps of a polish: through the calibration text, measured on the windows held out, the best weights kept.

What was done is handed over after each pass, and a minute after it was last, or ten times as long as that took, so that
a polish that was killed ends with the same bits.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from billhook_kernels.dispatch import one_thread
from tools.base.errors import BrokenPlan
from tools.base.files import KEEP_SECONDS
from tools.base.progress import FIGURES, Progress, Stopped, heed_stop
from tools.models.formats import DTYPES
from tools.plans.costs import PATIENCE, Means, Schedule
from tools.polish.gradients import KL, Survivors, Vectors
from tools.statistics.shards import Sums


class Step(NamedTuple):
    """Where a polish stands."""

    number: int
    """From 0."""
    total: int


class Optimiser(Protocol):
    """Takes steps."""

    name: ClassVar[str]
    """With its constants: weights that were polished by another are others. In which format it holds what it holds
    between two steps is no part of it: that is by what fits a machine, and told with the weights."""

    def take(self, values: Vectors, gradients: Vectors, step: Step) -> None:
        """Change the values in place, by the gradients of the step's mean KL at them."""

    @property
    def state(self) -> dict[str, Vectors]:
        """What it holds between two steps, changed in place by `take`; to be filled again after a kill."""


RATE = 1e-3
"""The most that one step moves a weight, about: Adam's learning rate after its warm-up, as a share of the root mean
square of its layer's survivors, for the weights of one model may be ten times those of another.

As in Adafactor's relative step size (Shazeer and Stern, arXiv 1804.04235, section 8). On SmolLM2 at 60 %, whose weights
have one of about 0.3, 12,288 tokens came to a validation KL of 0.634 so, and with one rate for all layers to 0.633
(3e-4) and 0.706 (8e-4); 0.840 before.
"""

WARM_UP = 0.1
"""Share of the steps in which the rate rises to that; then it falls to nothing along a line."""


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), its rate warmed up and decayed, and relative to the size that
    a layer's survivors have at the start; fp32, but for means between two steps where they are to be bf16.
    """

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8
    name: ClassVar[str] = f"adam relative {RATE} {WARM_UP} {BETAS} {EPSILON}"

    def __init__(self, values: Vectors, means: Means = "fp32") -> None:
        """`values` are those that the polish starts at, be it gone on with or not."""
        self._means, dtype = means, getattr(torch, DTYPES[means])
        self._sizes = {name: _measure_size(value_S) for name, value_S in values.items()}
        self._first = {name: torch.zeros_like(value_S, dtype=dtype) for name, value_S in values.items()}
        self._second = {name: torch.zeros_like(value_S, dtype=dtype) for name, value_S in values.items()}

    @property
    def state(self) -> dict[str, Vectors]:
        """As in `Optimiser`: the means of gradients and of their squares."""
        return {"first": self._first, "second": self._second}

    def take(self, values: Vectors, gradients: Vectors, step: Step) -> None:
        """As in `Optimiser`."""
        places = {name: place for place, name in enumerate(values)}
        for name, gradient_S in gradients.items():
            rate = find_rate(step) * self._sizes[name]
            value_S = values[name]
            first_S, second_S = self._first[name].float(), self._second[name].float()  # themselves where they are fp32
            self._move(value_S, gradient_S.to(value_S.device), first_S, second_S, rate, step.number + 1)
            if self._means == "bf16":
                chance = np.random.default_rng([step.number, places[name]])  # the same in a polish that was killed
                self._first[name].copy_(round_by_chance(first_S, chance))
                self._second[name].copy_(round_by_chance(second_S, chance))

    def _move(
        self, value_S: Tensor, gradient_S: Tensor, first_S: Tensor, second_S: Tensor, rate: float, power: int
    ) -> None:
        kept, kept_square = self.BETAS
        first_S.mul_(kept).add_(gradient_S, alpha=1 - kept)
        second_S.mul_(kept_square).addcmul_(gradient_S, gradient_S, value=1 - kept_square)
        size_S = (second_S / (1 - kept_square**power)).sqrt_().add_(self.EPSILON)
        value_S.addcdiv_(first_S, size_S, value=-rate / (1 - kept**power))


def find_rate(step: Step) -> float:
    """The learning rate of a step, relative to the size of what it moves."""
    rising = max(1, round(WARM_UP * step.total))
    if step.number < rising:
        return RATE * (step.number + 1) / rising
    return RATE * (step.total - step.number) / (step.total - rising + 1)


def round_by_chance(exact_S: Tensor, chance: np.random.Generator) -> Tensor:
    """fp32 to bf16, (S,): to one of the two neighbours, the nearer the likelier, so that it is right on average.

    To the nearest, a mean of squares would stand still: a step moves it by a thousandth of itself or so, and half of
    bf16's last place is two to four thousandths. What bf16 can hold stays as it is.
    """
    drawn_S = torch.from_numpy(chance.integers(1 << 16, size=len(exact_S), dtype=np.uint16))
    # carries into bf16's half of the bits as often as the other half is large
    bits_S = exact_S.view(torch.int32) + drawn_S.to(exact_S.device, torch.int32)
    return (bits_S >> 16).to(torch.int16).view(torch.bfloat16)


def _measure_size(value_S: Tensor) -> float:
    """Root mean square, the same for any number of threads; 0 of nothing."""
    if not len(value_S):
        return 0.0
    with one_thread(value_S.device):
        return float(value_S.double().square().mean().sqrt())


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
