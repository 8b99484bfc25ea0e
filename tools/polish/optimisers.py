"""Optimisers of a polish: what becomes of the survivors' values in one step.

One more is a class here that is an `Optimiser`. What it holds is plain tensors by name, so that a polish that was
killed goes on to the same bits.
"""

from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from billhook_kernels.threads import one_thread
from tools.models.formats import DTYPES
from tools.plans.polish import Means
from tools.polish.survivors import Vectors


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
