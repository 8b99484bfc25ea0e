"""Workers that cannot be had, or are not like this process."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fake_ray import make_connection
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.team.identity import Identity
from tools.team.places import Place, Places

OURS = Identity(billhook="0.1.0 (abc)", torch="2.9 on x86_64", device="cpu", model="with weights 12")


@pytest.fixture
def made(tiny_llama: Path) -> Places:
    """Places that nobody has come to."""
    settings = tiny_settings(tiny_llama, workers="2", worker_threads=2)
    return Places(make_connection(), settings, OURS, "cpu", None, pytest.fail)


def place(deaths: int = 0) -> Any:
    return Place(1, None, "opened", host="far", deaths=deaths)


def test_another_version_is_refused_by_name(made: Places) -> None:
    theirs = OURS.model_copy(update={"torch": "2.8 on x86_64", "model": "with weights 34"})
    made._connection.ray.get = lambda *_, **__: (theirs, "far", 7)
    with pytest.raises(UserError) as caught:
        made._wait_for(place())
    assert str(caught.value) == (
        "worker 1 on far has torch 2.8 on x86_64 instead of 2.9 on x86_64, model with weights 34 instead of with "
        "weights 12; give it the same, and start again"
    )


def test_a_worker_that_does_not_start(made: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    made._connection.ray.wait = lambda answers, **_: ([], answers)
    clock = itertools.count(0, 200)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(UserError, match="worker 1 did not start within 600 seconds; has the cluster 2 free CPUs"):
        made._wait_for(place())


def test_a_worker_that_writes_its_weights_to_a_file_has_longer(made: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    connection: Any = made._connection
    connection.ray.wait = lambda answers, **_: ([], answers)
    clock = itertools.count(0, 2000)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(Places, "_start", lambda _: (None, "opened"))
    with pytest.raises(UserError, match="worker 0 did not start within 2600 seconds"):
        made.open(2, None, 10**11)  # type: ignore[arg-type]


def test_a_worker_that_keeps_dying_ends_the_run(made: Places) -> None:
    with pytest.raises(UserError, match="worker 1 on far died 4 times; it may lack memory"):
        made.replace(place(deaths=3))
