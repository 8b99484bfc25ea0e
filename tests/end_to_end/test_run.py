"""Whole runs on tiny models of five architectures: what is exported, and what is said of it."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from markupsafe import escape

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    at_home,
    pick_prunable,
    read_events,
    read_run_config,
    read_summary,
    read_weights,
    run_here,
    run_outside,
    same_bits,
)
from tests.tiny import ARCHITECTURES, save_tiny_model
from tools.measure.continuations import PROMPTS
from tools.plans.costs import count_in_order
from tools.results.page.page import write_page
from tools.texts.windows import cut_windows

pytestmark = pytest.mark.figures

KINDS = [*((architecture, "fp32") for architecture in ARCHITECTURES), ("llama", "bf16"), ("llama", "fp16")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a finished run."""
    architecture, dtype = request.param
    home = tmp_path_factory.mktemp(f"{architecture}-{dtype}")
    save_tiny_model(home / "tiny", architecture)
    with at_home(home):
        assert run_here("--name", "run", "--model", "tiny", "--dtype", dtype, *TINY) == 0
        yield home / "runs" / "run"


def test_the_summary_has_its_keys_and_no_others(finished: Path) -> None:
    summary = read_summary(finished)
    assert list(summary) == [
        *("run", "model", "status", "target_sparsity", "achieved_sparsity", "reach"),
        *("perplexity", "wanda_statistics", "kl", "knowledge", "benchmarks", "polished", "samples", "plan", "kept"),
        *("iterations", "rollbacks", "evaluated_tokens", "agents", "seconds", "peak_memory_bytes", "mask_sha256"),
        "protocol",
    ]
    assert list(summary["agents"]) == [
        *("calls", "input_tokens", "output_tokens", "cost", "own_count", "failed_requests"),
    ]
    assert 0 < summary["reach"]["of_model"] < summary["reach"]["of_blocks"] == 1
    assert list(summary["perplexity"]) == ["dense", "pruned", "uniform_wanda"]
    assert summary["wanda_statistics"] == "sequential"
    assert list(summary["protocol"]) == ["text", "tokens", "window", "dtype", "versions", "bos", "cut", "spread"]
    assert (summary["run"], summary["model"], summary["status"]) == ("run", "tiny", "finished")
    assert summary["protocol"]["tokens"] == 128 and summary["protocol"]["dtype"] == read_run_config(finished).dtype
    assert all(math.isfinite(value) for value in summary["perplexity"].values())
    trials = read_events(finished, "trial")[1:]
    assert summary["iterations"] == len(trials)
    config = read_run_config(finished)
    walks = sum("~sequential" in trial["plan"] for trial in trials) * count_in_order(["sequential"], config)
    assert summary["evaluated_tokens"] == len(trials) * config.validation_tokens + walks
    assert summary["plan"] in [trial["plan"] for trial in trials if trial["verdict"] == "accept"]
    assert [list(sample) for sample in summary["samples"]] == [["prompt", "dense", "pruned"]] * len(PROMPTS)
    assert summary["rollbacks"] == sum(trial["verdict"] == "rollback" for trial in trials)


def test_the_page_is_what_the_command_makes_again(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert write_page([finished]) == page
    for sample in read_summary(finished)["samples"]:
        assert escape(sample["prompt"] + sample["pruned"]) in page.replace("</span>", "")


def test_the_sparsity_is_what_the_file_holds(finished: Path) -> None:
    layers = pick_prunable(read_weights(finished / "model"))
    zeros = sum(int((weight == 0).sum()) for weight in layers.values())
    share = zeros / sum(weight.numel() for weight in layers.values())
    summary = read_summary(finished)
    assert share == summary["achieved_sparsity"] == pytest.approx(0.45, abs=5e-4)


def test_the_mask_hash_comes_from_the_file_alone(finished: Path) -> None:
    digest = hashlib.sha256()
    for name, weight in sorted(pick_prunable(read_weights(finished / "model")).items()):
        digest.update(name.encode() + np.packbits((weight != 0).numpy(), bitorder="little").tobytes())
    assert digest.hexdigest() == read_summary(finished)["mask_sha256"]


def test_only_prunable_layers_differ_from_the_dense_model(finished: Path) -> None:
    dense, pruned = read_weights(finished.parents[1] / "tiny"), read_weights(finished / "model")
    assert pruned.keys() == dense.keys()
    prunable = {f"{name}.weight" for name in pick_prunable(dense)}
    dtype = next(iter(pruned.values())).dtype
    assert all(same_bits(pruned[name], dense[name].to(dtype)) for name in dense.keys() - prunable)


def test_stock_transformers_loads_it_with_the_perplexity_of_the_summary(finished: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    config = read_run_config(finished)
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
    windows = cut_windows(config, tokenizer).test
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    tolerance = 1e-5 if config.dtype == "fp32" else 2e-2  # a batch of two rounds otherwise than two batches of one
    assert math.exp(loss) == pytest.approx(read_summary(finished)["perplexity"]["pruned"], rel=tolerance)


def test_the_config_says_nothing_of_quantisation_or_sparsity(finished: Path) -> None:
    config = json.loads((finished / "model" / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config", "compression_config"} & config.keys()
    pickled = {".bin", ".pkl", ".pickle", ".pt", ".pth"}
    assert not [path for path in finished.rglob("*") if path.suffix in pickled]


def test_the_same_config_gives_the_same_masks_though_it_finds_the_first_runs_lessons(finished: Path) -> None:
    config = finished / "config.yaml"
    assert run_here("--config", str(config), "--name", "again") == 0
    again = finished.parent / "again"
    assert read_events(again, "lessons"), "the second run sees what the first one learnt"
    assert read_summary(again)["mask_sha256"] == read_summary(finished)["mask_sha256"]


def test_a_process_of_its_own_gives_the_same_masks_and_tells_them_in_three_lines(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    done = run_outside(tmp_path, "--name", "outside", "--model", str(tiny_llama), *TINY)
    assert (done.returncode, done.stderr) == (0, "")
    assert command("--name", "here", "--runs-dir", "elsewhere", "--model", str(tiny_llama), *TINY).code == 0
    summary = read_summary(tmp_path / "runs" / "outside")
    assert summary["mask_sha256"] == read_summary(tmp_path / "elsewhere" / "here")["mask_sha256"]
    result, perplexity, degradation, model, report = done.stdout.splitlines()[-5:]
    assert result.startswith("finished: sparsity 45.00% (target 45.00%)")
    assert perplexity.startswith(f"perplexity: {summary['perplexity']['pruned']:.2f} pruned")
    assert "that of uniform Wanda" in degradation
    assert model == "model:  runs/outside/model" and report == "report: runs/outside/report.html"


def test_protected_layers_are_left_alone(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    protect = "*.v_proj, blocks 1 · *.down_proj"
    assert command("--name", "p", "--model", str(tiny_llama), "--protect", protect, *TINY).code == 0
    dense, pruned = (pick_prunable(read_weights(path)) for path in (tiny_llama, tmp_path / "runs" / "p" / "model"))
    kept = {name for name in dense if name.endswith(".v_proj") or name.endswith("layers.1.mlp.down_proj")}
    assert len(kept) == 3
    assert {name for name in dense if same_bits(dense[name], pruned[name])} == kept
    assert read_summary(tmp_path / "runs" / "p")["achieved_sparsity"] == pytest.approx(0.45, abs=5e-4)
