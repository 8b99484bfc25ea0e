"""Runs that compare weights at the target on as many windows as it takes: what is counted, and what a stop changes."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    Halt,
    assert_same_weights,
    fork,
    read_events,
    read_run_config,
    read_summary,
    read_trials,
    run_apart,
)
from tools.plans.costs import count_in_order, count_walk

FURTHER = [*("--further-windows", "5", "--patience", "3", "--max-iterations", "6", "--tau", "10")]


@pytest.fixture(scope="module")
def weighing(flags: list[str]) -> list[str]:
    return [*flags, *FURTHER]


@pytest.fixture(scope="module")
def weighed(weighing: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to."""
    return run_apart(tmp_path_factory.mktemp("weighed"), *weighing)


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
    finalists = read_summary(weighed)["finalists"]
    config, plans = read_run_config(weighed), [trial["plan"] for trial in trials]
    walks = sum("sequential" in plan or "wanda" in plan for plan in plans) * count_in_order(["sequential"], config)
    walks += sum("refit" in plan and plan.endswith(":kappa") for plan in plans) * count_walk(config)
    measured = sum(trial["tokens"] for trial in trials) + len(finalists) * 5 * 64
    assert read_summary(weighed)["evaluated_tokens"] == measured + walks


def test_finalists_are_compared_on_windows_that_no_verdict_went_by(weighed: Path) -> None:
    summary, trials = read_summary(weighed), {trial["iteration"]: trial for trial in read_events(weighed, "trial")}
    finalists, kept = summary["finalists"], trials[summary["kept"]]
    accepted = [trial["iteration"] for trial in trials.values() if trial["verdict"] == "accept"]
    assert len(finalists) > 1 and finalists[0]["iteration"] == accepted[-1] and finalists[0]["better"] is None
    assert {finalist["windows"] for finalist in finalists} == {5}
    best = min(finalists, key=lambda finalist: finalist["kl"])
    assert (best["iteration"], best["plan"]) == (summary["kept"], summary["plan"]) == (kept["iteration"], kept["plan"])
    assert summary["kl"] == kept["kl"]
    others = [trials[finalist["iteration"]] for finalist in finalists[1:]]
    assert all(trial["verdict"] == "accept" or trial["better"] >= 0.25 for trial in others)
    assert read_events(weighed, "layers")[-1]["checkpoint"] == kept["checkpoint"]
    assert f"round {kept['iteration']} has the lowest KL on 5 windows" in (weighed / "report.md").read_text("utf-8")
    files = {path.name for path in (weighed / "evaluations").iterdir()}
    assert {f"further-{span}-{kept['checkpoint'][:16]}.json" for span in ("5-8", "8-10")} <= files


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
    assert read_summary(run)["finalists"] == read_summary(weighed)["finalists"]
    assert command("--replay", "run", "--name", "again").code == 0
    assert read_summary(tmp_path / "runs" / "again")["finalists"] == read_summary(weighed)["finalists"]
    assert_same_weights(tmp_path / "runs" / "again", weighed)


def test_no_trial_passes_the_cap(weighing: list[str], weighed: Path, command: Command) -> None:
    trials = read_events(weighed, "trial")[1:]
    reached = next(i for i, trial in enumerate(trials) if trial["verdict"] == "accept" and trial["sparsity"] > 0.449)
    before = sum(trial["tokens"] for trial in trials[: reached + 1])
    longest = (3 + 2 * 5) * 64 + 2 * 5 * 64  # with the finalists that it would leave
    assert command(*weighing, "--max-evaluated-tokens", str(before + longest - 1)).code == 0
    assert len(read_events(Path("runs/run"), "trial")[1:]) == reached + 1
