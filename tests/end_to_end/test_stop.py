"""SIGTERM in the middle of a step: it ends before its next layer or window of text, and goes on where it was."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    Halt,
    assert_same_weights,
    fork,
    read_events,
    read_state,
    read_summary,
    read_trials,
)

STOPS = [
    Halt("profile", "tools.measure.losses:measure_losses", 2, kind="stop"),
    Halt("profile", "tools.statistics.walks:Walks._step", 5, kind="stop"),
    Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 5, kind="stop"),
    Halt("validate", "tools.measure.losses:measure_losses", 2, kind="stop"),
]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{stop.node}-{stop.target.rpartition(':')[2]}")
def test_a_step_ends_before_its_next_layer_or_window(
    stop: Halt, flags: list[str], easy: Path, tmp_path: Path, command: Command
) -> None:
    stopped = fork(tmp_path, *flags, halt=stop).finish()
    run = tmp_path / "runs" / "run"
    assert (stopped.code, stopped.err) == (1, ""), "no call was made after the one that was under way"
    assert stopped.out.splitlines()[-2:] == [
        "stopped: stopped as asked, before the next layer or window of text",
        "resume with: python -m graph.run --resume run",
    ]
    assert read_events(run, "node")[-1]["node"] == stop.node
    assert command("--resume", "run").code == 0
    assert read_trials(run) == read_trials(easy)
    assert read_state(run).lessons == read_state(easy).lessons
    changing = {"seconds": 0, "peak_memory_bytes": 0}
    assert read_summary(run) | changing == read_summary(easy) | changing
    assert_same_weights(run, easy)
