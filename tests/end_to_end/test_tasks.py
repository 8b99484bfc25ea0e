"""A run with tasks: the dense and the pruned model are asked at its end, each once."""

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import read_events, read_summary
from tests.rows import write_rows
from tools.base.errors import UserError
from tools.experiments import evaluation


@pytest.fixture
def asked(tmp_path: Path, flags: list[str]) -> list[str]:
    """Flags of a run that asks three questions."""
    rows = [{"question": f"Who is {i}?", "answer": f"the {i}"} for i in range(5)]
    write_rows(tmp_path / "qa.jsonl", rows)
    return [*flags, "--max-iterations", "1", "--tasks", "freebaseqa", "--freebaseqa", "file:qa.jsonl", "--shots", "2"]


def test_tasks_are_in_the_summary_the_report_and_the_card_and_are_not_asked_again_after_a_stop(
    asked: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []
    ask = evaluation.run_benchmark

    def stop_at_the_second(benchmark: Any, model: Any, tokenizer: Any, label: str, progress: Any) -> Any:
        labels.append(label)
        if len(labels) == 2:
            raise UserError("stopped by the test")
        return ask(benchmark, model, tokenizer, label, progress)

    monkeypatch.setattr(evaluation, "run_benchmark", stop_at_the_second)
    assert command(*asked).code == 2
    resumed = command("--resume", "run")
    assert resumed.code == 0
    assert labels == ["dense", "pruned", "pruned"]

    run = tmp_path / "runs" / "run"
    scores = read_summary(run)["benchmarks"]
    assert [(score["model"], score["task"], score["metric"], score["samples"]) for score in scores] == [
        (model, "freebaseqa", metric, 3) for model in ("dense", "pruned") for metric in ("exact_match", "logprob")
    ]
    assert scores[1]["value"] != scores[3]["value"]
    assert read_events(run, "result")[0]["benchmarks"] == scores
    cells = [f"{score['value']:.4f} ± {score['error']:.4f}" for score in (scores[1], scores[3])]
    assert f"freebaseqa logprob: {cells[0]} dense, {cells[1]} pruned\n" in resumed.out
    row = f"| freebaseqa | logprob | {cells[0]} | {cells[1]} | 3 |"
    for file in ("report.md", "model/README.md"):
        text = (run / file).read_text()
        assert "## Tasks\n" in text and row in text and "shots 2, limit 0, data qa.jsonl " in text


def test_tasks_that_cannot_be_asked_are_refused_before_the_run(command: Command, flags: list[str]) -> None:
    outcome = command(*flags, "--tasks", "freebaseqa", "--freebaseqa", "file:nowhere.jsonl")
    assert (outcome.code, outcome.err) == (2, "error: file of questions nowhere.jsonl does not exist\n")
    assert not Path("runs").exists()
