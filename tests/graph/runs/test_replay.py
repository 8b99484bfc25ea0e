"""What is told of a replay where it is no longer the run that was recorded."""

import json
from pathlib import Path

import pytest

from graph.config import RunConfig
from graph.nodes.reflect import after_reflect
from graph.runs.replay import compare, read_record
from graph.state import State
from tests.made_runs import write_run
from tools.base.rundir import RUNS_DIR_VARIABLE, rewrite_log


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded run."""
    monkeypatch.setenv(RUNS_DIR_VARIABLE, str(tmp_path))
    return write_run(tmp_path / "recorded")


@pytest.fixture
def replaying(tmp_path: Path) -> Path:
    """The directory of its replay, in whose log nothing parts yet."""
    directory = tmp_path / "replaying"
    directory.mkdir()
    (directory / "events.jsonl").write_text("")
    return directory


def read_trial(run: Path) -> dict[str, object]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found: dict[str, object] = next(event for event in events if event["type"] == "trial" and event["iteration"] == 1)
    return found


def test_the_first_figure_that_differs_is_told(recorded: Path, replaying: Path) -> None:
    trial = read_trial(recorded)
    assert compare("recorded", trial, replaying) is None
    assert compare("recorded", trial | {"checkpoint": "f" * 64}, replaying) == (
        "parting",
        "trial 1: checkpoint 000000000000 in the record, ffffffffffff here",
    )


def test_a_replay_ends_for_the_reason_that_the_record_s_loop_had(recorded: Path) -> None:
    """What was noted at its end, is none."""
    lines = (recorded / "events.jsonl").read_bytes().splitlines()
    assert any(event["type"] == "node" and event["node"] == "finish" for event in map(json.loads, lines))
    note = {"time": 1.0, "type": "note", "text": "a thing"}
    rewrite_log(recorded, [*lines, json.dumps(note).encode()])
    assert read_record("recorded").stop == "2 iterations were asked for and done"


def test_a_replay_profiles_anew_where_the_record_did(recorded: Path) -> None:
    lines = (recorded / "events.jsonl").read_bytes().splitlines()
    events = [json.loads(line) for line in lines]
    place = next(i for i, event in enumerate(events) if event["type"] == "trial" and event["iteration"] == 1)
    assert read_record("recorded").profiled == set()
    again = json.dumps({"time": events[place]["time"], "type": "profile"}).encode()
    rewrite_log(recorded, [*lines[: place + 1], again, *lines[place + 1 :]])
    assert read_record("recorded").profiled == {1}
    state = State(run="again", config=RunConfig(reprofile=True), replay="recorded", iteration=1)
    assert after_reflect(state) == "profile"
    assert after_reflect(state.model_copy(update={"iteration": 2})) == "plan"
