"""Whole runs of a model whose tokenizer begins a text with a token."""

import math
from pathlib import Path

import pytest
import torch
import transformers

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    read_run_config,
    read_summary,
)
from tools.texts.windows import cut_windows

BEFORE = "a beginning-of-sequence token before every window (not counted)"


def test_a_run_is_measured_behind_it_and_says_so(beginning_llama: Path, tmp_path: Path, command: Command) -> None:
    done = command("--name", "run", "--model", str(beginning_llama), *TINY)
    assert (done.code, done.err) == (0, "")
    run = tmp_path / "runs" / "run"
    summary = read_summary(run)
    assert summary["protocol"]["bos"] is True and summary["protocol"]["tokens"] == 128
    for file in ("report.md", "report.html", "model/README.md"):
        assert f"windows of 64, {BEFORE}, fp32" in (run / file).read_text(encoding="utf-8"), file

    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    ids_BT = cut_windows(read_run_config(run), tokenizer).test
    assert ids_BT.shape == (2, 65) and set(ids_BT[:, 0].tolist()) == {tokenizer.bos_token_id}
    with torch.no_grad():
        logits = model(ids_BT).logits[:, 1:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 2:].flatten())
    assert math.exp(loss) == pytest.approx(summary["perplexity"]["pruned"], rel=1e-5)
