"""How fast models are: a forward of a window, and greedy decoding of one sequence."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tools.base.progress import Progress
from tools.measure.continuations import decode
from tools.models.readout import compute_hidden

REPEATS = 5
"""Timings are medians of this many, dense and cut model by turns."""
PROMPT, DECODED = 8, 32
"""Tokens read and tokens decoded to measure the speed of decoding."""


def measure_speeds(models: Sequence[Any], ids_T: Tensor, step: Progress) -> list[tuple[float, float]]:
    """(seconds of a forward of the window, greedily decoded tokens a second) of each model: medians, taken by turns."""
    forwards: list[list[float]] = [[] for _ in models]
    decodings: list[list[float]] = [[] for _ in models]
    for i in range(REPEATS + 1):  # the first warms up
        step("measure speed", i, REPEATS + 1)
        for model, forward, decoding in zip(models, forwards, decodings, strict=True):
            forward.append(_time(lambda: compute_hidden(model, ids_T[None]), ids_T))  # noqa: B023
            # Without a least number a model that ends its text early would seem the faster one.
            decoding.append(_time(lambda: decode(model, ids_T[None, :PROMPT], DECODED, DECODED), ids_T))  # noqa: B023
    step("measure speed", REPEATS + 1, REPEATS + 1)
    return [
        (statistics.median(forward[1:]), DECODED / statistics.median(decoding[1:]))
        for forward, decoding in zip(forwards, decodings, strict=True)
    ]


@torch.no_grad()
def _time(run: Callable[[], Any], ids_T: Tensor) -> float:
    cuda = ids_T.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(ids_T.device)
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(ids_T.device)
    return time.perf_counter() - began
