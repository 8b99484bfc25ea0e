"""The command hands its flags on."""

from pathlib import Path

import pytest

import tools.compare
from tests.tiny import tiny_settings
from tools.results.comparison import Comparison
from tools.workbench.open import close_workbench


def test_tasks_are_asked_of_the_dense_model_and_of_every_row(
    tiny_llama: Path, tmp_path: Path, no_plot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text("\n".join(f'{{"question": "Which is number {i}?", "answer": "class"}}' for i in range(8)))
    flags = tiny_settings(tiny_llama).model_dump(exclude={"model", "trust_remote_code", "partial", "calibration_mix"})
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    given += [f"--model={tiny_llama}", f"--out={tmp_path / 'out'}", "--preset=paper", "--sparsity=0.5"]
    given += ["--recipes=wanda:uniform,structured:flap", "--tasks=freebaseqa", f"--freebaseqa=file:{source}"]
    assert tools.compare.main([*given, "--limit=2", "--shots=1"]) == 0
    known = Comparison.model_validate_json((tmp_path / "out" / "compare.json").read_bytes())
    close_workbench()
    asked = [known.dense_scores, *(row.scores for row in known.rows)]
    assert [[(score.task, score.metric, score.samples) for score in scores] for scores in asked] == [
        [("freebaseqa", "exact_match", 2), ("freebaseqa", "logprob", 2)]
    ] * 3
    values = [[score.value for score in scores if score.metric == "logprob"] for scores in asked]
    assert values[0] != values[1] != values[2] != values[0]
    assert "| freebaseqa exact_match | freebaseqa logprob |" in (tmp_path / "out" / "compare.md").read_text()
