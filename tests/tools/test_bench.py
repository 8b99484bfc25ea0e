"""What the benchmarks time, and how it is told; never how long it takes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.tiny import save_tiny_model
from tools.bench import main
from tools.experiments import speed
from tools.experiments.speed import BENCHMARKS, BenchSettings, Result, Site
from tools.models.layers import find_layers

NAMES = [
    *("profile", "refit", "validation", "masks/24/rows", "masks/24/layer", "masks/24/moment", "obs/24"),
    *("refit/obs", "refit/published", "obs/model"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BenchSettings.model_fields:
        monkeypatch.delenv(f"BILLHOOK_{name.upper()}", raising=False)
    monkeypatch.setattr(speed, "SIDES", (24,))
    monkeypatch.setenv("COLUMNS", "160")


def tiny_flags(model: Path) -> list[str]:
    sizes = ["--window=64", "--calibration-windows=4", "--validation-windows=3", "--rounds=2"]
    return [f"--model={model}", "--device=cpu", *sizes]


def test_every_benchmark_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(tiny_flags(tiny_llama)) == 0
    assert not list(tmp_path.iterdir())
    table = capsys.readouterr().out
    assert all(f" {name} " in table for name in NAMES) and table.count(" of 2 ") == len(NAMES)
    assert f"{tiny_llama}, fp32, 1 threads" in table


def test_a_streamed_model_beside_its_bare_forward(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny_flags(tiny_llama), "--device=stream", "--only=passes"]) == 0
    table = capsys.readouterr().out
    assert all(f" {name} " in table for name in ("profile", "refit", "validation"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "masks,wandb"], "there is no benchmark 'wandb'; choose from passes, masks, updates"),
        (["--only", "masks", "--workers", "2"], "--only goes without --workers, of which"),
        (["--round", "3"], "unknown option '--round'; did you mean --rounds?"),
        (["--rounds", "0"], "rounds: input should be greater than or equal to 1, not '0'"),
        (["--model", "./none"], "model './none' is neither a directory, a .gguf file, package:NAME nor a hub id such"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {sentence}") and captured.err.count("\n") == 1
    assert not captured.out


def test_a_model_that_is_pruned_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_tiny_model(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    layer = find_layers(model)[5]
    layer.write(layer.weight_OI * (torch.arange(layer.weight_OI.shape[1]) % 2))
    model.save_pretrained(directory)
    assert main([*tiny_flags(directory), "--only=masks"]) == 2
    sentence = "error: a layer is 50% zero already; the benchmarks prune a dense model"
    assert capsys.readouterr().err.splitlines()[-1] == sentence


def test_what_is_done_is_told_when_it_is_stopped(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(site: Site) -> Iterator[Result]:
        yield Result("first", "one", "another", [1.0, 4.0], [2.0, 2.0])
        raise KeyboardInterrupt

    monkeypatch.setitem(BENCHMARKS, "masks", stop)  # type: ignore[arg-type, misc]
    assert main([*tiny_flags(tiny_llama), "--only=masks"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "stopped\n" and " first " in captured.out
    assert "1.25" in captured.out and "0.5 to 2 of 2" in captured.out
