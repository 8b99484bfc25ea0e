"""Runs of a model of which a block is held at a time: what one that holds the model whole finds, and its bits."""

import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    Halt,
    assert_same_weights,
    fork,
    read_summary,
    read_trials,
    run_apart,
)
from tests.rows import write_rows
from tests.tiny import tiny_settings
from tools.base.settings import count_checkpoints
from tools.models.disk import list_disk
from tools.models.layers import find_layers
from tools.statistics.shards import count_waiting

MORE = ("--target-sparsity", "0.5", "--max-iterations", "4", "--question-pairs", "4")
STREAM = ("--device", "stream")


@pytest.fixture(scope="module")
def flags(trained_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = [{"question": f"What comes after {i}", "answer": str(i + 1)} for i in range(40)]
    asked = write_rows(tmp_path_factory.mktemp("questions") / "questions.jsonl", rows)
    return ["--name", "run", "--model", str(trained_llama), *TINY, *MORE, "--questions", asked]


@pytest.fixture(scope="module")
def streamed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to."""
    return run_apart(tmp_path_factory.mktemp("streamed"), *flags, *STREAM)


def test_it_ends_where_a_run_ends_that_holds_the_model(flags: list[str], streamed: Path, tmp_path: Path) -> None:
    whole = run_apart(tmp_path, *flags)
    assert read_trials(streamed) == read_trials(whole)
    ours, theirs = read_summary(streamed), read_summary(whole)
    for figures in ("mask_sha256", "perplexity", "knowledge"):
        assert ours[figures] == theirs[figures], figures
    assert_same_weights(streamed, whole)


@pytest.mark.slow
def test_workers_that_stream_end_there_too(flags: list[str], tmp_path: Path) -> None:
    few = ("--max-iterations", "2")
    for name in ("whole", "shared"):
        (tmp_path / name).mkdir()
    whole = run_apart(tmp_path / "whole", *flags, *few)
    shared = run_apart(tmp_path / "shared", *flags, *few, *STREAM, "--workers", "2", "--worker-threads", "1")
    assert read_trials(shared) == read_trials(whole)
    ours, theirs = read_summary(shared), read_summary(whole)
    for figures in ("mask_sha256", "perplexity", "knowledge"):
        assert ours[figures] == theirs[figures], figures
    assert_same_weights(shared, whole)
    left = [path.name for path in shared.rglob(".*") if path.name.startswith((".mapped-", ".loading-"))]
    assert left == [], "files that workers' weights lie in have no names"


def test_killed_and_resumed_it_ends_there_too(
    flags: list[str], streamed: Path, tmp_path: Path, command: Command
) -> None:
    halt = Halt("validate", "tools.measure.losses:sum_losses", 2)
    assert fork(tmp_path, *flags, *STREAM, halt=halt).finish().code == -signal.SIGKILL
    assert command("--resume", "run").code == 0
    assert read_trials(tmp_path / "runs" / "run") == read_trials(streamed)
    assert_same_weights(tmp_path / "runs" / "run", streamed)


def test_killed_and_resumed_without_room_for_second_moments_of_more_than_a_block_and_then_for_states(
    flags: list[str],
    trained_llama: Path,
    streamed: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained_llama)
    settings, layers = (
        tiny_settings(trained_llama, questions="file:questions.jsonl"),
        find_layers(model),
    )
    known = {"in_source": {layer.name for layer in layers}, "waiting": count_waiting(settings.calibration_windows)}
    checkpoints = count_checkpoints(settings, 4, probes=False)
    lines = list_disk(model, layers, settings, at_once=1, streamed=True, checkpoints=checkpoints, **known)
    disk = ("--disk", str(sum(line.bytes for line in lines) / 1e9))
    halt = Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 10)
    assert fork(tmp_path, *flags, *STREAM, *disk, halt=halt).finish().code == -signal.SIGKILL
    monkeypatch.setattr("tools.base.memory.SHARE", 0.0)
    assert command("--resume", "run").code == 0
    run = tmp_path / "runs" / "run"
    assert "second moments are not kept, which takes " in (run / "events.jsonl").read_text()
    trials = [[(number, *others) for number, _, *others in read_trials(each)] for each in (run, streamed)]
    assert trials[0] == trials[1], "but for the names of checkpoints, which name the profile"
    assert read_summary(run)["mask_sha256"] == read_summary(streamed)["mask_sha256"]
    assert_same_weights(run, streamed)


def test_what_no_streamed_run_can_do_is_told_before_anything_is_loaded(
    command: Command, nothing_is_loaded: None
) -> None:
    said = command(*STREAM, "--polish-tokens", "256")
    assert (
        said.code == 2
        and (
            "polish_tokens: a polish holds all survivors with two means of their gradients, and cannot be streamed; "
            "leave it out, or use another --device\n"
        )
        in said.err
    )
