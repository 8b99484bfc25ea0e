"""Seconds of code that is really run, and the line through two runs that says what a larger one takes."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Fit(NamedTuple):
    """Seconds as a line over a size, such as tokens or rows."""

    fixed: float
    """What it takes however small it is."""
    each: float
    """What one more adds."""

    def at(self, size: float) -> float:
        """Seconds at a size."""
        return self.fixed + self.each * size


def time_call(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of one call, until the device is done with it."""
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit(small: tuple[float, float], large: tuple[float, float]) -> Fit:
    """The line through two (size, seconds), neither end of it below zero; through the larger one where it must bend."""
    (few, short), (many, long) = small, large
    each = (long - short) / (many - few) if many > few else long / max(many, 1.0)
    each = min(max(each, 0.0), long / max(many, 1.0))
    return Fit(long - each * many, each)
