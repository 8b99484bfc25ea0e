"""What a run's directory says of it."""

from pathlib import Path

import pytest

from tests.made_runs import add_round, begin_run, make_layers
from tools.base.rundir import append_event
from tools.results.page.page import write_page
from tools.results.page.record import read_run
from tools.workbench.store import ArtifactStore


def test_what_a_killed_node_had_done_is_told_once(tmp_path: Path) -> None:
    layers = make_layers()
    run = begin_run(tmp_path / "again", layers)
    add_round(run, 1, "accept", layers)
    add_round(run, 1, "rollback", layers)
    (round_,) = read_run(run).rounds.values()
    assert round_.trial is not None and round_.trial.verdict == "rollback"
    assert len(round_.lessons) == 1 and len(round_.replies) == 2  # both replies were paid for


def test_a_profile_of_another_form_is_told(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "odd", make_layers())
    profile = ArtifactStore(run / "artifacts").write_json({"layers": [{"name": 3}]})
    append_event(run, {"type": "profile", "profile": profile})
    with pytest.raises(ValueError, match=r"the profile of .*odd cannot be read: "):
        write_page([run])
