"""Whether a model is held or streamed goes by all that a run holds."""

import math
from pathlib import Path

import pytest
import torch

import tools.models.load as load
from tests.tiny import tiny_settings
from tools.base.progress import ignore_progress
from tools.estimate import memory
from tools.estimate.empty import build_empty
from tools.estimate.memory import HELD, Course, Devices, Place, choose_for_run, find_place
from tools.models.streamed import find_stream
from tools.workbench.bench import Workbench

PROCESS = 1000
COURSE = Course(trials=2)
MODEL = 103_040
"""Bytes of the 25,760 parameters of the tiny Llama."""


@pytest.fixture(autouse=True)
def _small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "measure_process", lambda: PROCESS)


def find(source: Path, device: str, size: int, course: Course = COURSE, workers: str = "") -> Place:
    settings = tiny_settings(source, device=device, workers=workers)
    return find_place(build_empty(settings), settings, course, Devices(1, size), PROCESS)


def test_auto_streams_a_model_that_fits_where_what_a_run_holds_does_not(tiny_llama: Path) -> None:
    held = find(tiny_llama, "cpu", 10**9)
    enough = math.ceil(held.count_needed(0)[0] / HELD)
    assert load.FITS * enough > 1.2 * MODEL, "the weights alone would fit"
    assert find(tiny_llama, "auto", enough).streamed is None
    streamed = find(tiny_llama, "auto", enough - 2)
    assert streamed.streamed == find(tiny_llama, "stream", enough).streamed and streamed.phases != held.phases
    assert find(tiny_llama, "cpu", enough - 2).streamed is None, "who says so is believed"
    polished = COURSE._replace(polish_tokens=128, polished_at=0.45)
    assert find(tiny_llama, "auto", enough - 2, polished).streamed is None, "a polish needs the model held"


def test_each_worker_holds_a_model_of_its_own(tiny_llama: Path) -> None:
    one, two = (find(tiny_llama, "cpu", 10**9, workers=count).count_needed(int(count))[0] for count in ("1", "2"))
    assert two - one > MODEL and one > find(tiny_llama, "cpu", 10**9).count_needed(0)[0]


def test_a_run_is_opened_as_it_was_foreseen(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, needed = tiny_settings(tiny_llama, device="auto"), find(tiny_llama, "cpu", 10**9).count_needed(0)[0]

    def choose(free: int, course: Course = COURSE) -> str:
        for module in (load, memory):
            monkeypatch.setattr(module, "count_free", lambda: free - PROCESS)
        return choose_for_run(settings, course).device

    enough = math.ceil(needed / HELD)
    with monkeypatch.context() as small:
        small.setattr(load, "WIDEST", 0)
        assert choose(enough // 2) == "auto", "a model that is small for the memory is not looked at"
    monkeypatch.setattr(load, "WIDEST", 10**9)
    a_token_more = round(1.05 * enough)  # which is all that a tokenizer, not asked for so little, may put before a text
    assert (choose(a_token_more), choose(enough - 2)) == ("auto", "stream")
    monkeypatch.setattr(memory, "find_place", lambda *_: 1 / 0)
    assert choose(enough - 2) == "auto", "what cannot be foreseen goes by its weights"


def test_what_a_run_holds_is_said_where_it_is_streamed_for_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(load, "WIDEST", 10**9)
    for module in (load, memory):
        monkeypatch.setattr(module, "count_free", lambda: 2 * MODEL)
    bench = Workbench(tiny_settings(tiny_llama, device="auto"), tmp_path, told.append, ignore_progress)
    assert find_stream(bench.model) is not None
    assert told == [
        "the model and what a run holds beside it do not fit the memory that is free: one block of it at a time comes "
        "from disk"
    ]
