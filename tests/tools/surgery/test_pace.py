"""What parts cost in seconds of decoding; the timings are made up."""

from typing import Any

import pytest

from tests.cuts import IDS
from tests.tiny import make_tiny_model
from tools.base.progress import ignore_progress
from tools.plans.cuts import Target
from tools.surgery.pace import price_parts


def price_with(monkeypatch: pytest.MonkeyPatch, slower: float) -> Target:
    """10 ms a token, 40 a block and 1 a neuron of it; the last timing is of a machine so many times slower."""
    model, timed = make_tiny_model("llama"), list[int]()

    def time_shapes(models: Any, *_: Any) -> list[tuple[float, float]]:
        timed.append(len(models))
        paces = [10 + x.config.num_hidden_layers * (40 + x.config.intermediate_size) for x in models]
        return [(0.0, 1000 / (pace * (slower if len(timed) > 1 else 1))) for pace in paces]

    monkeypatch.setattr("tools.surgery.pace.measure_speeds", time_shapes)
    target = price_parts(model, 1.25, IDS[0], ignore_progress)
    assert timed == [4, 2], "blocks, heads and neurons beside the dense model, then one cut"
    return target


def test_a_machine_that_has_become_slower_changes_nothing_of_what_must_go(monkeypatch: pytest.MonkeyPatch) -> None:
    assert price_with(monkeypatch, 1.4).share == pytest.approx(price_with(monkeypatch, 1.0).share, rel=1e-9)
