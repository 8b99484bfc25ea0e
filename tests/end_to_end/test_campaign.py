"""Short campaigns; the long ones are a command: `python -m tests.campaign`."""

import pytest

from tests.campaign import damage
from tests.campaign.kill import run_campaign


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_come_to_the_same() -> None:
    assert run_campaign(times=3, seed=0, workers_every=0) == 0


@pytest.mark.slow
def test_files_that_are_edited_at_random_show_no_wrong_figure() -> None:
    assert damage.run_campaign(times=5, seed=0, nodes=("prune",), compared=False) == 0
