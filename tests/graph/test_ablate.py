"""`python -m graph.ablate`: what is refused."""

from pathlib import Path

import pytest

from graph.ablate import main


def test_a_budget_below_one_trial_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_llama), "--window=64", "--validation-windows=3", "--evaluated-tokens=191"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: evaluated_tokens 191 allow no trial: one takes 192\n"
    assert main(["--target-sparsity", "45"]) == 2
    said = "error: target_sparsity: 45 looks like a percentage; write it as a fraction, such as 0.45, not '45'\n"
    assert capsys.readouterr().err == said
