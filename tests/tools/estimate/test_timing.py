"""What is timed of one block stands for all blocks of its kind; no second is asserted that a clock gave."""

from typing import Any

import pytest
import torch

from tests.tools.estimate.test_block import make_empty
from tools.estimate import block, timing
from tools.estimate.timing import time_run
from tools.plans.recipe import Recipe

CPU = torch.device("cpu")
MASKS, REFIT = Recipe(method="two-sided", refit=False), Recipe()


def test_every_step_of_one_block_counts_for_all_of_its_kind(a_second_each: list[str]) -> None:
    times = time_run(make_empty("llama"), 64, CPU, 4, {"masks": MASKS, "refit": REFIT}, {"refit": REFIT})
    steps = times.steps
    assert times.tokens == 64
    assert (steps.forward, steps.statistics, steps.gradients, steps.describe) == (2, 2, 2 + 1, 2)
    assert (steps.curves.fixed, steps.curves.each) == (2, 0), "as long for few tokens as for many"
    assert (steps.loss, steps.divergence, steps.word) == (1, 1, 2 + 1)
    layers = 2 * 7  # q, k and v read the same, as do gate and up
    assert times.prune == {"masks": layers, "refit": 2 * 4 + layers}
    assert times.cut == {"refit": 2 * 4 + layers}
    assert times.moments == 2 * 4 * (3 * 32 * 32 + 48 * 48)
    assert times.write == times.read == 2 / timing.WRITTEN


def test_a_head_that_was_cut_counts_in_full(a_second_each: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "WORDS", 80)
    steps = time_run(make_empty("llama"), 64, CPU, 1, {}, {}).steps
    assert (steps.gradients, steps.loss, steps.divergence, steps.word) == (2 + 4, 4, 4, 2 + 4)


def test_blocks_of_two_kinds_are_both_run(a_second_each: list[str]) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = make_empty("gemma3", num_hidden_layers=4, layer_types=kinds)
    assert time_run(model, 64, CPU, 1, {"masks": MASKS}, {}).prune == {"masks": 4 * 7}
    assert time_run(model, 64, CPU, 1, {}, {}).steps.forward == 4


def test_a_short_window_stands_for_a_long_one_where_time_is_short(
    a_second_each: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    walk = timing._walk

    def note(sample: Any, ids_T: torch.Tensor, *others: Any) -> Any:
        seen.append(len(ids_T))
        return walk(sample, ids_T, *others)._replace(forward=3.0 + 2 * len(ids_T))

    monkeypatch.setattr(timing, "_walk", note)
    monkeypatch.setattr(timing, "BUDGET", 1e-9)
    monkeypatch.setattr(timing, "SHORT", 4)
    model = make_empty("llama")
    times = time_run(model, 64, CPU, 1, {}, {})
    assert (times.tokens, seen) == (32, [4, 4, 32])
    assert times.steps.forward == pytest.approx(3 + 2 * 64)
