"""The command: two models go on side by side, and bad input is told."""

from pathlib import Path

import pytest
import torch

from billhook_kernels.native import explain_absence
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tools import export, generate
from tools.models.layers import find_layers


def save_pair(directory: Path) -> tuple[Path, Path]:
    """(a plain directory, the same model packed), bf16, half of the layers' weights zero."""
    model = make_tiny_model("llama")
    for layer in find_layers(model):
        layer.write(torch.where(layer.weight_OI.abs() > 0.2, layer.weight_OI, 0))
    model.bfloat16().save_pretrained(directory / "plain")
    make_tiny_tokenizer().save_pretrained(directory / "plain")
    assert export.main([str(directory / "plain"), "--packed", str(directory / "packed")]) == 0
    return directory / "plain", directory / "packed"


def test_two_models_go_on_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if explain_absence(torch.bfloat16):
        pytest.skip(explain_absence(torch.bfloat16))
    plain, packed = save_pair(tmp_path)
    capsys.readouterr()
    arguments = [str(packed), "--compare", str(plain), "--prompt", "import this", "--tokens", "7", "--device", "cpu"]
    assert generate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("---")]
    assert [lines[i] for i in heads] == [f"--- {packed}, bf16, packed", f"--- {plain}, bf16"]
    texts = ["\n".join(lines[heads[0] + 1 : heads[1]]), "\n".join(lines[heads[1] + 1 :])]
    assert texts[0].startswith("import this") and texts[1].startswith(texts[0])
    assert "the same 7 tokens" in lines and lines[-1].endswith(" of the bytes")
    rows = {cells[1].strip(): cells[2:4] for line in lines if len(cells := line.split("│")) == 5}
    assert [cell.strip() for cell in rows["tokens"]] == ["7", "7"]
    assert [bool(cell.strip()) for cell in rows["of these packed, MB"]] == [True, False]


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
