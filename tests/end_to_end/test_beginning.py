"""Whole runs of a model whose tokenizer begins a text with a token, and such runs of an earlier version."""

import math
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from graph.config import RunConfig
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    Halt,
    assert_same_weights,
    fork,
    read_run_config,
    read_state,
    read_summary,
    read_trials,
)
from tools.texts import windows
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


@dataclass(frozen=True)
class Earlier(Halt):
    """A process of a version that knows no `bos`, killed."""

    def arm(self) -> None:
        dump = RunConfig.model_dump
        RunConfig.model_dump = lambda self, **options: without_bos(dump(self, **options))  # type: ignore[method-assign]
        windows.find_bos = lambda tokenizer: None
        super().arm()


def without_bos(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if name != "bos"}


def test_a_run_of_an_earlier_version_keeps_its_windows(beginning_llama: Path, tmp_path: Path, command: Command) -> None:
    flags = ("--model", str(beginning_llama), *TINY)
    halt = Earlier("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 5)
    assert fork(tmp_path, "--name", "old", *flags, halt=halt).finish().code == -signal.SIGKILL
    old = tmp_path / "runs" / "old"
    assert "bos" not in yaml.safe_load((old / "config.yaml").read_text())
    assert read_state(old).config.bos == "never"
    refused = command("--resume", "old", "--bos", "auto")
    assert (refused.code, refused.err) == (
        2,
        "error: run 'old' cannot be resumed with a changed config (bos); start a new run\n",
    )
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(yaml.safe_load((old / "config.yaml").read_text())))
    resumed = command("--resume", "old", "--config", "same.yaml")
    assert (resumed.code, resumed.err) == (0, "")
    assert command("--name", "never", "--bos", "never", "--no-memory", *flags).code == 0
    never = tmp_path / "runs" / "never"
    assert read_trials(old) == read_trials(never)
    assert_same_weights(old, never)
    assert read_summary(old)["perplexity"] == read_summary(never)["perplexity"]
    assert read_summary(old)["protocol"]["bos"] is False

    assert command("--replay", "old", "--name", "again").code == 0
    assert read_summary(tmp_path / "runs" / "again")["mask_sha256"] == read_summary(old)["mask_sha256"]
    assert read_run_config(tmp_path / "runs" / "again").bos == "never"
