"""The command: two models go on side by side, and bad input is told."""

from pathlib import Path

import pytest

from tests.tiny import save_tiny_model
from tools import generate


def test_two_models_go_on_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, dense = save_tiny_model(tmp_path / "ours"), save_tiny_model(tmp_path / "dense")
    arguments = [str(ours), "--compare", str(dense), "--prompt", "import this", "--tokens", "7", "--device", "cpu"]
    assert generate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("---")]
    assert [lines[i] for i in heads] == [f"--- {ours}, fp32", f"--- {dense}, fp32"]
    texts = ["\n".join(lines[heads[0] + 1 : heads[1]]), "\n".join(lines[heads[1] + 1 :])]
    assert texts[0].startswith("import this") and texts[1].startswith(texts[0])
    assert "the same 7 tokens" in lines and lines[-1] == "1.000 of the bytes"
    rows = {cells[1].strip(): cells[2:4] for line in lines if len(cells := line.split("│")) == 5}
    assert [cell.strip() for cell in rows["tokens"]] == ["7", "7"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--tokens", "x"], "argument --tokens: invalid int value: 'x'"),
        (["--tokens", "4095"], "3 tokens of prompt and 4095 more do not fit into 4096 positions"),
        (["--prompt", ""], "the prompt has no tokens; give some text"),
        (["--compare", "./nowhere"], "model './nowhere' is neither a directory"),
    ],
)
def test_bad_input_is_told(
    flags: list[str], problem: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if "--prompt" in flags else ["--prompt", "aaa"]
    assert generate.main([str(tiny_llama), *prompt, *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")
