"""Whether a model is held or streamed goes by all that a run holds, and polishes have a disk of their own."""

import math
import shutil
from pathlib import Path

import pytest

import tools.models.load as load
from tests.tiny import tiny_settings
from tests.tools.estimate.helpers import MODEL
from tools.base.progress import ignore_progress
from tools.estimate import places
from tools.estimate.course import Course, CutCourse
from tools.estimate.needs import Estimate, estimate
from tools.estimate.places import HELD, choose_for_run
from tools.estimate.polish import count_polish_disk
from tools.estimate.room import Devices
from tools.models.layers import find_layers
from tools.models.streamed import find_stream
from tools.plans.recipe import Recipe
from tools.workbench.bench import Workbench

COURSE = Course(rounds=[Recipe(method="two-sided", refit=False), Recipe(curves="mask")])
PROCESS = 1000


@pytest.fixture(autouse=True)
def _small_process(monkeypatch: pytest.MonkeyPatch, untimed: None, no_gpu: None) -> None:
    monkeypatch.setattr(places, "measure_process", lambda: PROCESS)


def find(source: Path, device: str, size: int, course: Course = COURSE) -> Estimate:
    devices = Devices(count=1, bytes=size)
    return estimate(tiny_settings(source, device=device), course, target=0.45, devices=devices)


def test_auto_streams_a_model_that_fits_where_what_a_run_holds_does_not(tiny_llama: Path) -> None:
    held = find(tiny_llama, "cpu", 10**9)
    enough = math.ceil(held.needed[0] / HELD)
    assert load.FITS * enough > 1.2 * MODEL, "the weights alone would fit"
    found, short = find(tiny_llama, "auto", enough), find(tiny_llama, "auto", enough - 2)
    assert (found.streamed, found.phases) == (0, held.phases)
    streamed = find(tiny_llama, "stream", enough)
    assert short.streamed > 0 and short.phases != held.phases
    assert (short.disk, short.needed[0]) == (streamed.disk, find(tiny_llama, "auto", enough - 2).needed[0])
    assert find(tiny_llama, "cpu", enough - 2).streamed == 0, "who says so is believed"


def test_auto_holds_a_model_of_what_cannot_be_streamed_as_long_as_its_weights_fit(tiny_llama: Path) -> None:
    enough = math.ceil(find(tiny_llama, "cpu", 10**9).needed[0] / HELD)
    polished = COURSE._replace(polishes=[128], polished_at=0.45)
    assert find(tiny_llama, "auto", enough - 2, polished).streamed == 0
    faster = Course([], cut=CutCourse(rounds=1, size=0.0, align=1))
    assert find(tiny_llama, "auto", enough - 2, faster).streamed == 0


def test_a_run_is_opened_as_it_was_foreseen(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, needed = tiny_settings(tiny_llama, device="auto"), find(tiny_llama, "cpu", 10**9).needed[0]

    def choose(free: int, course: Course = COURSE) -> str:
        for module in (load, places):
            monkeypatch.setattr(module, "count_free", lambda: free - PROCESS)
        return choose_for_run(settings, course, tmp_path).device

    enough = math.ceil(needed / HELD)
    with monkeypatch.context() as small:
        small.setattr(load, "WIDEST", 0)
        assert choose(enough - 2) == "auto", "a model that is small for the memory is not looked at"
    a_token_more = round(1.05 * enough)  # which is all that a tokenizer, not asked for so little, may put before a text
    assert (choose(a_token_more), choose(enough - 2)) == ("auto", "stream")
    assert choose(enough - 2, COURSE._replace(polishes=[128], polished_at=0.45)) == "auto"
    monkeypatch.setattr(places, "count_block", lambda *_: 1 / 0)
    assert choose(enough - 2) == "auto", "what cannot be foreseen goes by its weights"


def test_what_a_run_holds_is_said_where_it_is_streamed_for_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(load, "WIDEST", 10**9)
    for module in (load, places):
        monkeypatch.setattr(module, "count_free", lambda: 2 * MODEL)
    bench = Workbench(tiny_settings(tiny_llama, device="auto"), tmp_path, told.append, ignore_progress)
    assert find_stream(bench.model) is not None
    assert told == [
        "the model and what a run holds beside it do not fit the memory that is free: one block of it at a time comes "
        "from disk"
    ]


def test_moments_are_kept_where_there_is_room_beside_a_polish(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polished = COURSE._replace(polishes=[128], polished_at=0.45)
    kept, room = estimate(tiny_settings(tiny_llama), polished, target=0.45), shutil.disk_usage(tiny_llama)
    plain = estimate(tiny_settings(tiny_llama), COURSE, target=0.45)
    model, _ = load.load_model(tiny_settings(tiny_llama))
    polish = count_polish_disk(model, find_layers(model), tiny_settings(tiny_llama), 0, polished)
    assert kept.at_once is None and polish > 0
    for free, at_once in ((plain.disk_bytes + polish, None), (plain.disk_bytes + polish - 1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _place, free=free: room._replace(free=free))
        assert estimate(tiny_settings(tiny_llama), polished, target=0.45).at_once == at_once
