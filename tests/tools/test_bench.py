"""What the benchmarks time, and how it is told; never how long it takes."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny import save_tiny_model
from tools.bench import main
from tools.experiments.speed import BenchSettings, Site
from tools.experiments.speed_suite import BENCHMARKS
from tools.models.layers import find_layers
from tools.results.speed import Report

ROUNDS = 2
NAMES = [
    *("wanda", "wanda/squares", "wanda/masks", "wanda/moments", "wanda/published", "wanda/score"),
    *("profile", "kappa-of-method"),
    *("masks/24/rows", "masks/24/layer", "masks/160/rows", "masks/160/layer", "obs/24", "obs/160"),
    *(f"refit/{layer}/{other}" for layer in ("32x32", "16x32", "48x32", "32x48") for other in ("obs", "published")),
    *("refit/model/obs", "refit/model/published", "obs/model", "allocation"),
    *("validation/last-third", "rollback/all", "rollback/last-block"),
    *("polish/autograd", "polish/forward"),
]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BenchSettings.model_fields:
        monkeypatch.delenv(f"BILLHOOK_{name.upper()}", raising=False)


def tiny_flags(model: Path) -> list[str]:
    sizes = ["--window=64", "--calibration-windows=4", "--validation-windows=3", f"--rounds={ROUNDS}"]
    return [f"--model={model}", "--device=cpu", "--obs-sizes=24,160", *sizes]


def test_every_benchmark_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "reports" / "bench.json"
    assert main([*tiny_flags(tiny_llama), f"--json={path}"]) == 0
    assert not list(temporary.iterdir())

    report = Report.model_validate_json(path.read_bytes())
    assert [result.name for result in report.results] == NAMES
    for result in report.results:
        assert len(result.seconds) == len(result.reference_seconds) == ROUNDS
        ratios = [s / r for s, r in zip(result.seconds, result.reference_seconds, strict=True)]
        assert 0 < result.low == min(ratios) <= result.ratio == statistics.median(ratios) <= result.high == max(ratios)
        assert min(*result.seconds, *result.reference_seconds) > 0
        assert result.what and result.reference
    peaks = [result.peak_memory_bytes for result in report.results]
    assert peaks[0] > 1e8 and peaks == sorted(peaks)
    targets = {result.name: result.target for result in report.results if result.target is not None}
    assert targets == {"wanda": 1.3, "profile": 4.0, "allocation": 1.0}
    assert report.settings["model"] == str(tiny_llama) and report.settings["obs_sizes"] == [24, 160]
    assert (report.device, report.threads) == ("cpu", torch.get_num_threads())
    assert report.versions["torch"] == torch.__version__

    table = capsys.readouterr().out
    assert all(f" {name} " in table for name in NAMES)
    assert f"{tiny_llama}, fp32, cpu, 1 threads" in table.replace("\n", "")
    assert len(re.findall(r" (?:1.3|4|1) \((?:met|missed)\) ", table)) == 3


def test_a_streamed_model_beside_its_bare_forward(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert main([*tiny_flags(tiny_llama), "--stream", f"--json={path}"]) == 0
    report = Report.model_validate_json(path.read_bytes())
    assert report.settings["device"] == "stream"
    targets = {result.name: result.target for result in report.results}
    assert targets == {"stream/profile": 4.0, "stream/refit": 3.0, "stream/validation": 1.2}
    assert min(min(*result.seconds, *result.reference_seconds) for result in report.results) > 0


def test_a_streamed_model_is_not_polished_behind_all_else(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny_flags(tiny_llama), "--device", "stream"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: polish: a polish holds ") and "leave it out with --only, or use another" in said


def test_only_what_was_asked_for_in_the_usual_order(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    assert main([*tiny_flags(tiny_llama), "--only", "allocation, obs", f"--json={path}"]) == 0
    names = [result["name"] for result in json.loads(path.read_text())["results"]]
    assert names == ["obs/24", "obs/160", "allocation"]
    out = capsys.readouterr().out
    assert "refit" not in out and "met" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--only", "obs,wandb"],
            "there is no benchmark 'wandb'; choose from wanda, profile, kappa-of-method, masks, obs, refit, "
            "allocation, validation, polish",
        ),
        (["--round", "3"], "unknown option '--round'; did you mean --rounds?"),
        (["--rounds", "0"], "rounds: input should be greater than or equal to 1, not '0'"),
        (["--obs-sizes", "8,0"], "obs_sizes: a layer has at least one row and column, not '8,0'"),
        (["--window", "2"], "window: input should be greater than or equal to 8, not '2'"),
        (["--model", "./none"], "model './none' is neither a directory, a .gguf file, package:NAME nor a hub id such"),
        (["--json", "."], ". cannot be written: "),
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
    assert main([*tiny_flags(directory), "--only=allocation"]) == 2
    sentence = "error: layer model.layers.0.mlp.up_proj is 50% zero already; the benchmarks prune a dense model"
    assert capsys.readouterr().err.splitlines()[-1] == sentence


def test_what_is_done_is_kept_when_it_is_stopped(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(site: Site) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(BENCHMARKS, "validation", stop)
    path = tmp_path / "bench.json"
    assert main([*tiny_flags(tiny_llama), "--only=allocation,validation", f"--json={path}"]) == 1
    captured = capsys.readouterr()
    assert " allocation " in captured.out and captured.err == "stopped\n"
    assert [result["name"] for result in json.loads(path.read_text())["results"]] == ["allocation"]
