"""Runs that compare weights at the target on as many windows as it takes: what is counted, and what a stop changes."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    Halt,
    assert_same_weights,
    at_home,
    fork,
    read_events,
    read_summary,
    read_trials,
    run_here,
)

FURTHER = [*("--further-windows", "5", "--patience", "3", "--max-iterations", "6", "--tau", "10")]


@pytest.fixture(scope="module")
def weighing(flags: list[str]) -> list[str]:
    return [*flags, *FURTHER]


@pytest.fixture(scope="module")
def weighed(weighing: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to."""
    home = tmp_path_factory.mktemp("weighed")
    with at_home(home):
        assert run_here(*weighing) == 0
    return home / "runs" / "run"


def test_at_the_target_the_likelier_weights_are_kept(weighed: Path) -> None:
    trials = read_events(weighed, "trial")[1:]
    reached = next(i for i, trial in enumerate(trials) if trial["verdict"] == "accept" and trial["sparsity"] > 0.449)
    assert all((t["better"], t["compared_windows"]) == (None, 0) for t in trials[: reached + 1])
    at_target = trials[reached + 1 :]
    assert at_target and {t["compared_windows"] for t in at_target} <= {3, 6, 8}
    known = 0
    for trial in at_target:
        assert (trial["verdict"] == "accept") == (trial["better"] >= 0.75)
        said = f"on {trial['compared_windows']} windows, better with probability {trial['better']:.3f}"
        assert said in trial["reason"] and said in (weighed / "report.md").read_text(encoding="utf-8")
        assert trial["compared_windows"] == 8 or not 0.05 < trial["better"] < 0.95
        further = trial["compared_windows"] - 3
        assert trial["tokens"] == (3 + further + max(further - known, 0)) * 64
        known = further if trial["verdict"] == "accept" else max(known, further)
    assert read_summary(weighed)["evaluated_tokens"] == sum(trial["tokens"] for trial in trials)


def test_a_comparison_that_is_stopped_goes_on_where_it_was(
    weighing: list[str], weighed: Path, tmp_path: Path, command: Command
) -> None:
    stop = Halt("validate", "tools.workbench.evaluate:Evaluator.evaluate_further", 2, kind="stop")
    stopped = fork(tmp_path, *weighing, halt=stop).finish()
    run = tmp_path / "runs" / "run"
    assert (stopped.code, stopped.err) == (1, "") and read_events(run, "node")[-1]["node"] == "validate"
    assert command("--resume", "run").code == 0
    assert read_trials(run) == read_trials(weighed)
    assert_same_weights(run, weighed)


def test_no_trial_passes_the_cap(weighing: list[str], weighed: Path, command: Command) -> None:
    trials = read_events(weighed, "trial")[1:]
    reached = next(i for i, trial in enumerate(trials) if trial["verdict"] == "accept" and trial["sparsity"] > 0.449)
    before = sum(trial["tokens"] for trial in trials[: reached + 1])
    longest = (3 + 2 * 5) * 64
    assert command(*weighing, "--max-evaluated-tokens", str(before + longest - 1)).code == 0
    assert len(read_events(Path("runs/run"), "trial")[1:]) == reached + 1
