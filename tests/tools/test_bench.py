"""What the benchmarks time, and how it is told; never how long it takes."""

import itertools
import json
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tools.bench
import tools.team.worker
from kernels.guard import row_errors
from kernels.masks import keep_highest, keep_highest_of_rows
from kernels.methods import prune_levels, prune_weight
from kernels.obs import prune_obs
from tests.tiny import make_tiny_model, save_tiny_model, tiny_settings
from tools.base.options import check_options
from tools.base.settings import TEAM, WorkbenchSettings
from tools.bench import (
    BENCHMARKS,
    BenchSettings,
    Report,
    Site,
    Task,
    back_propagate,
    bench_kappa_of_method,
    bench_validation,
    main,
    make_layer,
    prune_as_published,
    remove_by_sort,
)
from tools.measure.losses import PrefixCache
from tools.models.layers import find_layers
from tools.plans.work_order import order_allocation
from tools.workbench.bench import DENSE, Workbench, use_workbench

ROUNDS = 2
NAMES = [
    *("wanda", "wanda/squares", "wanda/masks", "wanda/moments", "wanda/published", "profile", "kappa-of-method"),
    *("masks/24/rows", "masks/24/layer", "masks/160/rows", "masks/160/layer", "obs/24", "obs/160"),
    *(f"refit/{layer}/{other}" for layer in ("32x32", "16x32", "48x32", "32x48") for other in ("obs", "published")),
    *("refit/model/obs", "refit/model/published", "obs/model", "allocation"),
    *("validation/last-third", "rollback/all", "rollback/last-block"),
]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BenchSettings.model_fields:
        monkeypatch.delenv(f"BILLHOOK_{name.upper()}", raising=False)


def tiny_flags(model: Path) -> list[str]:
    sizes = ["--window=64", "--calibration-windows=4", "--validation-windows=3", f"--rounds={ROUNDS}"]
    return [f"--model={model}", "--device=cpu", "--obs-sizes=24,160", *sizes]


@pytest.fixture
def site(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Iterator[Site]:
    """An opened workbench of a tiny model."""
    settings = BenchSettings(**tiny_settings(tiny_llama).model_dump(exclude=set(TEAM)), rounds=ROUNDS)
    with use_workbench(settings, tmp_path / "work", pytest.fail, lambda *_: None) as bench:
        yield Site(bench, settings)


# --- the command -----------------------------------------------------------------------------------------------


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


def test_parts_add_up(site: Site) -> None:
    whole, squares, masks, moments, published = BENCHMARKS["wanda"](site)
    assert published.seconds == whole.seconds
    assert whole.seconds == [a + b for a, b in zip(squares.seconds, masks.seconds, strict=True)]
    assert whole.reference_seconds == squares.reference_seconds == masks.reference_seconds == moments.reference_seconds
    results = {result.name: result for result in BENCHMARKS["refit"](site)}
    model = results["obs/model"]
    assert model.seconds == results["refit/model/obs"].reference_seconds
    assert model.reference_seconds == results["refit/model/published"].reference_seconds
    times = {"32x32": 4, "16x32": 4, "48x32": 4, "32x48": 2}  # seven layers in each of two blocks
    for reference in ("obs", "published"):
        for key in ("seconds", "reference_seconds"):
            rounds = [[n * s for s in getattr(results[f"refit/{x}/{reference}"], key)] for x, n in times.items()]
            expected = [sum(parts) for parts in zip(*rounds, strict=True)]
            assert getattr(results[f"refit/model/{reference}"], key) == pytest.approx(expected)


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
            "allocation, validation",
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


def test_defaults_are_smaller_but_fields_are_the_runs_own() -> None:
    for name, field in WorkbenchSettings.model_fields.items():
        own = BenchSettings.model_fields[name]
        assert (own.description, own.metadata) == (field.description, field.metadata)
        if name.endswith("window") or name.endswith("windows"):
            assert own.default < field.default
        else:
            assert own.default == field.default
    assert check_options(BenchSettings, {"obs_sizes": "64, 32"}).obs_sizes == [64, 32]


# --- what is timed ---------------------------------------------------------------------------------------------


def test_tasks_take_turns_and_the_first_round_warms_up(site: Site) -> None:
    seen: list[str] = []
    tasks = Task(lambda: seen.append("a")), Task(lambda: seen.append("b"), lambda: seen.append("before b"))
    seconds = site.time(*tasks)
    assert seen == ["a", "before b", "b"] * (1 + ROUNDS)
    assert [len(taken) for taken in seconds] == [ROUNDS, ROUNDS]

    seen.clear()
    site.settings.round_seconds = 0
    assert [len(taken) for taken in site.time(*tasks)] == [1, 1]
    assert seen == ["a", "before b", "b"]


def test_only_the_task_itself_is_timed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(site, "_now", lambda: next(ticks))
    assert site.time(Task(lambda: next(ticks), lambda: [next(ticks) for _ in range(5)])) == [[2.0, 2.0]]


def test_curves_and_pruning_are_made_anew_every_round(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, curves = [], []

    def one(method: str, *arguments: Any, **options: Any) -> Any:
        pruned.append((method, options["refit"]))
        return prune_weight(method, *arguments, **options)

    def levels(method: str, *arguments: Any, **options: Any) -> Any:
        curves.append((method, options["refit"]))
        return prune_levels(method, *arguments, **options)

    monkeypatch.setattr(tools.team.worker, "prune_weight", one)
    monkeypatch.setattr(tools.team.worker, "prune_levels", levels)
    bench_kappa_of_method(site)
    assert pruned == curves == [("refit", False)] * (1 + ROUNDS) * len(site.bench.layers)


def test_rollbacks_and_validations_change_what_they_say(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[str]] = []
    starts: list[int] = []
    restore, time, replay = Workbench.restore, Site.time, PrefixCache.replay

    def record(bench: Workbench, checkpoint: str) -> list[str]:
        timed.append(restore(bench, checkpoint))
        return timed[-1]

    @contextmanager
    def note(cache: PrefixCache, ids_T: Tensor, first: int, window: int) -> Iterator[None]:
        starts.append(first)
        with replay(cache, ids_T, first, window):
            yield

    def clear_first(task: Task) -> Task:
        """Only what is timed remains recorded, until the next preparation."""

        def prepare() -> None:
            task.prepare()
            timed.clear()
            starts.clear()

        def run() -> None:
            task.run()
            seen.append((list(timed), list(starts)))

        return Task(run, prepare)

    seen: list[Any] = []
    monkeypatch.setattr(Workbench, "restore", record)
    monkeypatch.setattr(PrefixCache, "replay", note)
    monkeypatch.setattr(Site, "time", lambda site, *tasks: time(site, *map(clear_first, tasks)))
    bench_validation(site)
    names = [layer.name for layer in site.bench.layers]
    last = [layer.name for layer in site.bench.layers if layer.block == 1]
    windows = len(site.bench.windows.validation)
    # A validation restores its checkpoint, which is there already. Two blocks: the last third begins at block 1.
    round_ = [([], []), ([[]], [1] * windows), ([names], []), ([last], [])]
    assert seen == round_ * (1 + ROUNDS)


def test_dense_weights_are_what_statistics_are_taken_of(site: Site) -> None:
    allocation = site.share_out(0.5)
    site.bench.prune(site.profile, order_allocation(tools.bench.UPDATED, allocation), lambda *_: None)
    BENCHMARKS["wanda"](site)
    assert set(site.bench.installed.values()) == {DENSE}
    site.bench.prune(site.profile, order_allocation(tools.bench.UPDATED, allocation), lambda *_: None)
    BENCHMARKS["profile"](site)
    assert set(site.bench.installed.values()) == {DENSE}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bare_back_propagation(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(architecture)
    layers, windows = find_layers(model), torch.arange(48).view(2, 24)
    gradients: list[tuple[Tensor, ...]] = []
    grad = torch.autograd.grad

    def keep(*arguments: Any, **options: Any) -> Any:
        gradients.append(grad(*arguments, **options))
        return gradients[-1]

    monkeypatch.setattr(torch.autograd, "grad", keep)
    back_propagate(model, layers, windows)
    assert [[g.shape for g in some] for some in gradients] == [[layer.stored_weight.shape for layer in layers]] * 2
    assert all(float(g.abs().max()) > 0 for some in gradients for g in some)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(IndexError):
        back_propagate(model, layers, windows + 10_000)
    assert not any(p.requires_grad for p in model.parameters())


# --- the published loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 128), (64, 160), (48, 300)])
def test_the_published_loop_prunes_as_well_as_ours(shape: tuple[int, int]) -> None:
    weight, moment = make_layer(*shape, torch.device("cpu"))
    published = prune_as_published(weight, moment, 0.5)
    for start in range(0, shape[1], 128):
        block = published[:, start : start + 128]
        assert int((block == 0).sum()) == block.numel() // 2
    ours = prune_obs(weight, moment, weight.numel() // 2).weight_OI
    theirs, our_error = (float(row_errors(weight - w, moment).sum()) for w in (published, ours))
    masked = float(row_errors(weight * (published == 0), moment).sum())
    assert theirs == pytest.approx(our_error, rel=0.03)
    assert theirs < 0.7 * masked  # or the update does nothing


def test_the_published_masks_are_ours() -> None:
    score = torch.randint(9, (24, 160), generator=torch.Generator().manual_seed(0)).float()  # with many ties
    none_dead, half = torch.zeros_like(score, dtype=torch.bool), score.numel() // 2
    assert torch.equal(remove_by_sort(score, 0.5), ~keep_highest_of_rows(score, none_dead, half))
    layer = remove_by_sort(score.reshape(1, -1), 0.5).reshape(score.shape)
    assert torch.equal(layer, ~keep_highest(score, none_dead, half))


def test_the_published_loop_is_optimal_brain_surgery() -> None:
    """Small enough for the definition: after each column, the inverse of what is left of H, in float64."""
    weight, moment = make_layer(5, 12, torch.device("cpu"))
    published = prune_as_published(weight, moment, 0.5)
    hessian = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(12)
    expected = weight.double()
    for j in range(12):
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = torch.where(published[:, j] == 0, expected[:, j] / inverse[0, 0], 0.0)
        expected[:, j:] -= torch.outer(error, inverse[0])
    torch.testing.assert_close(published.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_published_loop_on_dead_columns_and_in_bf16() -> None:
    weight, moment = make_layer(64, 128, torch.device("cpu"))
    before = weight.clone(), moment.clone()
    moment[3] = moment[:, 3] = 0
    pruned = prune_as_published(weight.bfloat16(), moment, 0.5)
    assert pruned.dtype == torch.bfloat16
    assert int((pruned == 0).sum()) == 64 * 128 // 2 and not pruned[:, 3].any()
    assert torch.isfinite(pruned).all()
    assert torch.equal(weight, before[0])
    moment[3], moment[:, 3] = before[1][3], before[1][:, 3]
    assert torch.equal(moment, before[1])
