"""Workers that cannot be had, or are not like this process."""

from pathlib import Path
from typing import Any

import pytest

from tests.fake_ray import make_connection
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.team.places import Place, Places
from tools.team.worker import Identity

OURS = Identity(billhook="0.1.0 (abc)", torch="2.9 on x86_64", device="cpu", model="with weights 12")


@pytest.fixture
def made(tiny_llama: Path) -> Places:
    """Places that nobody has come to."""
    settings = tiny_settings(tiny_llama, workers="2", worker_threads=2)
    return Places(make_connection(), settings, OURS, "cpu", None, pytest.fail)


def place(deaths: int = 0) -> Any:
    return Place(1, None, "opened", host="far", deaths=deaths)


def test_a_worker_that_keeps_dying_ends_the_run(made: Places) -> None:
    with pytest.raises(UserError, match="worker 1 on far died 4 times; it may lack memory"):
        made.replace(place(deaths=3))
