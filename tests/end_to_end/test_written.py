"""Runs and comparisons on text that the model writes itself: no file, no hub, no data set."""

from pathlib import Path

import pytest

from tests.comparisons import make_settings, run_comparison
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    Halt,
    assert_same_weights,
    fork,
    read_summary,
    read_trials,
    run_apart,
)
from tools.workbench.open import close_workbench

SELF = ("--calibration", "self", "--validation", "self:import os | class A", "--test", "self:import os | class A")
HALTS = [
    Halt("profile", "tools.workbench.written:draw_rows", 2),
    Halt("profile", "tools.models.sampling:_Draw.__call__", 100, kind="stop"),
]


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_apart(tmp_path_factory.mktemp("undisturbed"), *flags, *SELF)


def test_summary_and_reports_name_the_source(undisturbed: Path) -> None:
    summary = read_summary(undisturbed)
    assert summary["protocol"]["text"] == "self:import os | class A"
    assert r"self:import os \| class A" in (undisturbed / "report.md").read_text()
    assert "self:import os | class A" in (undisturbed / "report.html").read_text()
    assert r"self:import os \| class A" in (undisturbed / "model" / "README.md").read_text()


@pytest.mark.parametrize("halt", HALTS, ids=lambda halt: f"{halt.kind}-{halt.count}")
def test_interrupted_while_it_writes_and_resumed(
    halt: Halt, flags: list[str], undisturbed: Path, tmp_path: Path, command: Command
) -> None:
    ended = fork(tmp_path, *flags, *SELF, halt=halt).finish()
    assert ended.code == (1 if halt.kind == "stop" else -9)
    run = tmp_path / "runs" / "run"
    before = set((run / "artifacts").rglob("*.json"))
    assert before, "what was written is kept"
    assert command("--resume", "run").code == 0
    assert before <= set((run / "artifacts").rglob("*.json"))
    assert read_trials(run) == read_trials(undisturbed)
    changing = {"seconds": 0, "peak_memory_bytes": 0}
    assert read_summary(run) | changing == read_summary(undisturbed) | changing
    assert_same_weights(run, undisturbed)


def test_recipes_are_compared_by_it(tiny_llama: Path, tmp_path: Path, no_plot: None, command: Command) -> None:
    settings = make_settings(tiny_llama, tmp_path / "out", calibration="self", recipes="refit:kappa", sparsity="0.5")
    known, _ = run_comparison(settings)
    assert known.settings["calibration"] == "self" and known.rows[0].achieved_sparsity == 0.5
    close_workbench()
    again, _ = run_comparison(settings.model_copy(update={"recipes": "refit:kappa,wanda~dense:uniform"}))
    assert again.profile == known.profile and again.rows[0] == known.rows[0] and len(again.rows) == 2


def test_bad_prompts_are_one_line(tiny_llama: Path, command: Command) -> None:
    outcome = command("--model", str(tiny_llama), "--calibration", "self:Write.", "--test", "self:Write.")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(
        "error: the calibration and test texts come from 1 prompt of one source, 'self:Write.'"
    )
    assert outcome.err.count("\n") == 1


def test_a_dry_run_counts_what_writing_takes(tiny_llama: Path, command: Command) -> None:
    plain, own = (command("--dry-run", "--model", str(tiny_llama), *more) for more in ((), SELF))
    assert (own.code, own.err) == (0, "")
    assert " write texts" in own.out and " write texts" not in plain.out
    assert " (texts " in own.out and " (profile " in plain.out
