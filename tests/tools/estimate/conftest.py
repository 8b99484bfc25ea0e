"""No GPU, and a clock that needs no time."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tools.estimate import cut_work, needs, places, pruning, timing, units


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, and layers are counted once in a process."""
    monkeypatch.setattr(needs, "explain_absence", lambda *_: "this test has no time")
    monkeypatch.setattr(places, "count_layer", _count_once)


@functools.cache
def _count_forms(forms: frozenset[tuple[int, int]], dtype: torch.dtype, methods: frozenset[str]) -> pruning.Held:
    return pruning.count_layer(forms, dtype, methods)


def _count_once(forms: Any, dtype: torch.dtype, methods: Any) -> pruning.Held:
    return _count_forms(frozenset(forms), dtype, frozenset(methods))


@pytest.fixture
def a_second_each(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever is timed is done, and takes a second."""
    calls: list[str] = []

    def take(_device: torch.device, call: Callable[[], Any]) -> float:
        call()
        calls.append(getattr(getattr(call, "func", call), "__name__", "a module"))
        return 1.0

    for module in (timing, pruning, cut_work, units):
        monkeypatch.setattr(module, "time_call", take)
    return calls
