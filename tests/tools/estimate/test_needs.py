"""The estimate of whole runs: of a tiny model and of large ones that are not here, without reading a weight."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from billhook_kernels.packed import PADDING
from billhook_kernels.triangle import BAND
from tests.tiny import convert_here, make_tiny_config, save_tiny_gguf, save_tiny_model, tiny_settings
from tests.tools.estimate.helpers import DENSE, MODEL, QWEN3_8B, STATE, large_settings, sizes, write_config
from tools.base.errors import UserError
from tools.estimate import needs as module
from tools.estimate import places
from tools.estimate.course import Course
from tools.estimate.needs import Estimate, estimate
from tools.estimate.phases import ASKED_FOR, WRITE, measure_process
from tools.estimate.polish import POLISH
from tools.estimate.room import Devices, read_devices
from tools.models.artifacts import HEADER
from tools.models.load import load_model
from tools.plans.recipe import Recipe
from tools.texts.written import BATCH
from tools.workbench.bench import Workbench

COURSE = Course(rounds=[Recipe(method="two-sided", refit=False), Recipe(curves="mask")], tests=3)


def find(source: Path | str, devices: Devices | None = None, **changes: Any) -> Estimate:
    """Of a run to 45 % of a model with tiny windows."""
    return estimate(tiny_settings(source, **changes), COURSE, target=0.45, devices=devices)


def find_large(directory: Path, devices: str, **changes: Any) -> Estimate:
    """Of a run of a large model on GPUs of another machine."""
    return estimate(large_settings(directory, **changes), COURSE, target=0.45, devices=read_devices(devices))


def test_text_that_the_model_writes_takes_its_keys_and_values(tiny_llama: Path, untimed: None) -> None:
    window, hidden = tiny_settings(tiny_llama).window, 32
    for workers in ("", "2"):
        found = find(tiny_llama, calibration="self", workers=workers)
        (phase,) = [phase for phase in found.phases if phase.name == WRITE]
        (line,) = [line for line in phase.device if line.what == "keys and values, at most"]
        assert line.bytes == 2 * found.blocks * BATCH * window * hidden * 4
        assert not any(phase.name == WRITE for phase in found.of_worker)
    assert not any(phase.name == WRITE for phase in find(tiny_llama).phases)


def test_a_tiny_llama(tiny_llama: Path, untimed: None) -> None:
    found = find(tiny_llama)
    assert (found.parameters, found.blocks, found.layers, found.weights) == (25_760, 2, 14, 15_360)
    assert (found.zeros, found.dense, found.device, found.untimed) == (6_912, [], "cpu", "this test has no time")
    assert found.disk_bytes == sum(line.bytes for line in found.disk)
    assert Estimate.model_validate_json(found.model_dump_json()) == found
    host = max(found.phases, key=lambda phase: phase.host_bytes)
    assert host.name == "validate", "it holds the hidden states of the text three times"
    assert found.needed == max((phase.bytes, phase.name) for phase in found.phases)


def test_one_block_is_really_run(tiny_llama: Path) -> None:
    found = find(tiny_llama)
    assert (found.untimed, found.tokens) == ("", 64)
    seconds = {work.name: found.seconds(work) for work in found.work}
    assert all(took is not None and took >= 0 for took in seconds.values())
    assert 0 < sum(work.times * (found.seconds(work) or 0) for work in found.work) < 600


def test_workers_that_crowd_a_cpu_are_slower(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    prices = {"forward": 1.0}
    assert module._crowd(prices, "cpu", 6) == {"forward": 3.0}
    assert module._crowd(prices, "cpu", 1) == module._crowd(prices, "cuda", 6) == prices


def test_experts_are_counted_by_the_tokens_that_they_are_sent(tmp_path: Path, untimed: None) -> None:
    found = find(write_config(tmp_path / "moe", make_tiny_config("qwen3_moe").to_dict()))
    plain, experts = 1024 + 512 + 512 + 1024, 4 * 3 * 16 * 32
    assert (found.layers, found.weights) == (32, 2 * (plain + experts))
    assert found.dense == ["model.layers.*.mlp.gate.weight"]
    # A token meets 2 of 4 experts of 16 features, and a router to 4: FLOPs count these alone.
    attention = 2 * 2 * 64 * 64 * 32
    assert found.work[1].flops == 4 * 2 * (64 * 2 * (plain + experts / 2 + 4 * 32) + attention)
    # What experts read is summed over the tokens that they are sent; gate and up of each read the same.
    assert found.work[2].flops == 4 * 2 * 64 * 2 * (4 * 32**2 + 4 / 2 * (32**2 + 16**2))
    assert found.disk[0].bytes == 2 * 4 * (4 * 32**2 + 4 * (32**2 + 16**2))
    assert found.disk[0].how == "4 bytes × the upper half of inputs², over 24 layers"


def test_qwen3_8b_on_a_gpu_that_is_not_here(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    found = find_large(write_config(tmp_path / "qwen3-8b", QWEN3_8B), "80")
    assert (found.parameters, found.blocks, found.layers) == (8_190_735_360, 36, 252)
    assert (found.weights, found.zeros) == (6_945_767_424, 3_125_595_341)
    assert found.phases[0].device_bytes == 2 * found.parameters
    assert found.phases[0].host_bytes == found.phases[0].host[0].bytes + 2 * found.parameters
    most, phase = found.needed
    assert phase == ASKED_FOR and 25e9 < most < 28e9
    assert found.disk_bytes == (
        36 * 2 * (6 * 4096 * (4096 + BAND) + 12288 * (12288 + BAND))
        + 36 * 16 * 2048 * 4096 * 2
        + 5 * (found.weights * 17 // 8 + found.layers * (2 * PADDING + HEADER))
        + 2 * (found.parameters + found.weights)  # 132 GB
    )
    assert {work.seconds for work in found.work} == {None}


def test_the_model_s_own_memory_is_taken_by_no_block_of_a_large_one(tmp_path: Path, no_gpu: None) -> None:
    found = find_large(write_config(tmp_path / "qwen3-8b", QWEN3_8B), "80")
    assert (found.untimed, found.tokens) == ("torch sees no GPU here", 0)


def test_a_worker_shares_the_first_gpu_with_this_process(tiny_llama: Path, no_gpu: None, untimed: None) -> None:
    found = find(tiny_llama, device="cuda", workers="2")
    workers = {phase.name: phase for phase in found.of_worker}
    first = {p.name: p.device_bytes + workers[p.name].device_bytes for p in found.phases}
    assert found.needed == (first[ASKED_FOR], ASKED_FOR) and first[ASKED_FOR] == max(first.values())
    whole = {p.name: p.host_bytes + 2 * workers[p.name].host_bytes + p.store_bytes for p in found.phases}
    assert {phase.name: found.count_host(phase) for phase in found.phases} == whole


def test_all_processes_share_the_memory_of_a_cpu(tiny_llama: Path, untimed: None) -> None:
    found = find(tiny_llama, workers="2", worker_threads=1)
    assert (found.workers, found.threads) == (2, 1)
    whole = {p.name: p.bytes + 2 * w.bytes + p.store_bytes for p, w in zip(found.phases, found.of_worker, strict=True)}
    assert {phase.name: found.count_host(phase) for phase in found.phases} == whole
    assert found.needed[0] == max(whole.values())


@pytest.mark.parametrize("workers", ["auto", "ray://head:10001"])
def test_a_cluster_is_not_asked(tiny_llama: Path, workers: str) -> None:
    with pytest.raises(UserError, match=rf"^how many workers {workers} has is not asked here; give their number, such"):
        find(tiny_llama, workers=workers)


def test_a_config_alone_says_the_same_as_the_model(tiny_llama: Path, tmp_path: Path, untimed: None) -> None:
    directory = write_config(tmp_path / "shape", json.loads((tiny_llama / "config.json").read_text()))
    expected = find(tiny_llama)
    for source in (directory, directory / "config.json"):
        found = find(source)
        assert [sizes(phase) for phase in found.phases] == [sizes(phase) for phase in expected.phases]
        assert (found.disk, found.work) == (expected.disk, expected.work)


def test_the_workbench_asks_for_the_same_disk_and_keeps_as_many_block_inputs(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untimed: None
) -> None:
    found, room = find(tiny_llama), shutil.disk_usage(tmp_path)

    told: list[str] = []

    def open_with(free: int) -> Workbench:
        monkeypatch.setattr(shutil, "disk_usage", lambda _place: room._replace(free=free))
        return Workbench(tiny_settings(tiny_llama), tmp_path / str(free), told.append, lambda *step: None)

    for directory in (found.disk_bytes, found.other_disk, found.other_disk - 1):
        (tmp_path / str(directory)).mkdir()
    with pytest.raises(UserError, match=r"^the disk is full: "):
        open_with(found.other_disk - 1)
    open_with(found.other_disk)
    assert len(told) == 1 and told[0].startswith("second moments are not kept")
    bench = open_with(found.disk_bytes)
    assert len(told) == 1
    kept = next(line for line in found.phases[1].host if line.what.startswith("inputs of every few blocks"))
    assert kept.bytes == len(bench.losses.prefix.kept) * 3 * STATE > 0
    few = estimate(tiny_settings(tiny_llama), COURSE._replace(checkpoints=2), target=0.45)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: room._replace(free=few.disk_bytes))
    assert few.disk_bytes < found.disk_bytes
    (tmp_path / "few").mkdir()
    Workbench(
        tiny_settings(tiny_llama), tmp_path / "few", told.append, lambda *step: None, course=Course([], checkpoints=2)
    )
    assert len(told) == 1, "the same room does for less"


def test_dense_weights_that_a_streamed_model_has_in_its_files_take_no_disk(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None, untimed: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def count_dense(source: Path, **changes: Any) -> int:
        lines = find(source, **{"device": "stream", **changes}).disk
        return sum(line.bytes for line in lines if line.what == "the dense weights of the prunable layers")

    assert (count_dense(tiny_llama), count_dense(tiny_llama, device="cpu")) == (0, DENSE)
    assert count_dense(tiny_llama, dtype="bf16") == DENSE // 2, "the file is fp32"
    config = json.loads((tiny_llama / "config.json").read_text())
    assert count_dense(write_config(tmp_path / "shape", config)) == DENSE, "a config alone"
    attention = 2 * (1024 + 512 + 512 + 1024)
    experts = find(save_tiny_model(tmp_path / "moe", "qwen3_moe"), device="stream")
    assert experts.disk[-1].bytes == 4 * (experts.weights - attention)
    assert experts.disk[-1].how.endswith("; of 24 layers, the model's own files have others")
    apart = [line.bytes for line in experts.disk if line.what == "experts on their way to the export"]
    assert apart == [experts.disk[-1].bytes], "taken apart, as their files have them, once more"

    gguf = save_tiny_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", lambda *_: pytest.fail("nothing is of its name: it need not be read"))
        assert count_dense(gguf) == DENSE
    converted = find(gguf, device="stream").disk[-1]
    assert (converted.what, converted.bytes) == ("the .gguf file, converted", MODEL)
    convert_here(monkeypatch)
    load_model(tiny_settings(gguf, device="stream"), tmp_path / "scratch")
    assert count_dense(gguf) == 0, "now that it is converted"
    assert find(gguf, device="stream").disk[-1].what != converted.what

    least, room = find(tiny_llama, device="stream").other_disk - MODEL, shutil.disk_usage(tmp_path)
    told: list[str] = []

    def open_with(free: int) -> None:
        """The model as it is now is there by then."""
        monkeypatch.setattr(shutil, "disk_usage", lambda _place: room._replace(free=free))
        Workbench(tiny_settings(tiny_llama, device="stream"), tmp_path / "run", told.append, lambda *step: None)

    with pytest.raises(UserError, match=r"^the disk is full: "):
        open_with(least - 1)
    open_with(least)
    assert len(told) == 1 and told[0].startswith("second moments are not kept")


def test_a_token_before_the_text_of_each_window_is_read_too(
    beginning_llama: Path, tiny_llama: Path, tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = measure_process()  # which may grow between two estimates
    monkeypatch.setattr(places, "measure_process", lambda: process)
    begun, plain = find(beginning_llama), find(tiny_llama)
    never = find(beginning_llama, bos="never")
    assert (never.phases, never.disk, never.work) == (plain.phases, plain.disk, plain.work)
    assert begun.disk[1].bytes - plain.disk[1].bytes == 2 * 2 * 32 * 4, "blocks, windows, width, bytes"
    assert begun.disk[1].how == "2 blocks × 2 windows × 65 tokens × 32 wide × 4 bytes"
    hidden = [next(line for line in found.phases[1].host if line.what == "hidden states") for found in (begun, plain)]
    assert hidden[0].bytes - hidden[1].bytes == 2 * 3 * 32 * 4
    assert begun.work[1].how == plain.work[1].how == "forward of 4 windows of 64 tokens of calibration text"
    assert begun.work[1].flops > plain.work[1].flops
    config = write_config(tmp_path / "shape", json.loads((beginning_llama / "config.json").read_text()))
    assert find(config / "config.json").disk == plain.disk, "a config alone has no tokenizer to ask"
    with pytest.raises(UserError, match=r"^windows of 4096 tokens behind the beginning-of-sequence token take 4097 po"):
        find(beginning_llama, window=4096)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("nowhere.json", r"model config nowhere\.json does not exist; give the path of a config\.json"),
        ("no-such/model", r"model 'no-such/model' is not on this machine, and the hub is not asked, .*"),
        ("empty", r"model directory empty has no config\.json; is it a saved transformers model\?"),
        ("./nowhere", r"model '\./nowhere' is neither a directory, a \.gguf file, .*"),
        ("torn", r"model 'torn' could not be built from its config: .*not a valid JSON file.*"),
        ("torn/config.json", r"model 'torn/config\.json' could not be built from its config: .*"),
        ("vit", r"model 'vit' could not be built from its config: Unrecognized configuration class .*"),
        ("no-type", r"model 'no-type' could not be built from its config: .*"),
        ("blockless", r"the model has no prunable linear layers inside decoder blocks"),
        ("broken.gguf", r"model 'broken\.gguf' could not be built from its config: .*"),
    ],
)
def test_what_cannot_be_estimated_is_said_in_one_line(
    model: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_config(tmp_path / "torn", {})
    (tmp_path / "torn" / "config.json").write_text("{")
    write_config(tmp_path / "vit", {"model_type": "vit"})
    write_config(tmp_path / "no-type", {"hidden_size": 32})
    write_config(tmp_path / "blockless", make_tiny_config("llama").to_dict() | {"num_hidden_layers": 0})
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"^{sentence}$"):
        find(model)


def test_a_block_that_cannot_be_run_here_has_no_time(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []

    def fail(*_arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        raise RuntimeError("no memory\nis left")

    monkeypatch.setattr(module, "time_run", fail)
    found = find(tiny_llama, workers="1", worker_threads=2)
    assert (found.untimed, found.tokens) == ("one block could not be run here: no memory is left", 0)
    assert {work.seconds for work in found.work} == {None}
    assert (seen, torch.get_num_threads()) == ([2], before), "as many threads as a worker has"


def test_a_polish_has_its_memory_disk_and_work(tiny_llama: Path, untimed: None) -> None:
    settings = tiny_settings(tiny_llama, calibration_windows=8)
    plain = estimate(settings, COURSE, target=0.5)
    course = COURSE._replace(polishes=[64 * 7, 64 * 14], polished_at=0.5)
    found = estimate(settings, course, target=0.5)
    survivors, step = 15_360 // 2, 7
    phase = next(phase for phase in found.phases if phase.name == POLISH)
    others = [(other.name, sizes(other)) for other in found.phases if other is not phase]
    assert others == [(other.name, sizes(other)) for other in plain.phases]
    held = {line.what: line.bytes for line in (*phase.device, *phase.host)}
    assert held["survivors before they are rounded"] == held["the best survivors so far"] == 4 * survivors
    assert held["state of the optimiser"] == 8 * survivors and held["which weights survive"] == 15_360
    assert held["gradients, sums over windows in the making"] == 4 * 4 * survivors, f"a tree over {step} windows"
    assert held["inputs of all blocks, one window"] == 2 * STATE
    assert held["dense hidden states on calibration text"] == 8 * STATE
    assert found.disk_bytes - plain.disk_bytes == 2 * 16 * survivors + 8 * STATE
    first, second = (work for work in found.work if work.name == POLISH)
    assert first.how == "two forwards and a backward of 7 windows, 1 others measured 2 times"
    assert second.how == "two forwards and a backward of 14 windows, 1 others measured 3 times"
    assert 0 < first.flops < second.flops and first.share == 1
    rounds = [work.times for work in found.work if work.name == "prune"]
    saved = estimate(settings, course._replace(standing=[COURSE.rounds[0]]), target=0.5)
    assert [work.times for work in saved.work if work.name == "prune"] == [rounds[0] - 1, *rounds[1:]]
    shared = estimate(settings.model_copy(update={"workers": "2"}), course, target=0.5)
    assert [phase.name for phase in shared.phases] == [phase.name for phase in shared.of_worker]
    assert [work.share for work in shared.work if work.name == POLISH] == [4 / 7, 4 / 7]
    own, theirs = (next(p for p in phases if p.name == POLISH) for phases in (shared.phases, shared.of_worker))
    assert own.store_bytes and "state of the optimiser" in {line.what for line in own.device}
    assert "graph and backward of one block" in {line.what for line in theirs.device}
    with pytest.raises(UserError, match=r"^polish on 63 tokens is less than one window of 64; give it more$"):
        estimate(settings, course._replace(polishes=[63]), target=0.5)


@pytest.mark.parametrize(("room", "away"), [("1x80", True), ("1x400", False)])
def test_what_a_polish_keeps_lies_in_cpu_memory_where_a_gpu_has_too_little_room(
    room: str, away: bool, tmp_path: Path, untimed: None
) -> None:
    course = COURSE._replace(polishes=[4096], polished_at=0.45)
    settings = large_settings(write_config(tmp_path / "qwen3-8b", QWEN3_8B))
    found = estimate(settings, course, target=0.45, devices=read_devices(room))
    phase = next(phase for phase in found.phases if phase.name == POLISH)
    there, here = ({line.what for line in lines} for lines in (phase.device, phase.host))
    state = {"survivors before they are rounded", "state of the optimiser", "the best survivors so far"}
    assert (state <= here, state & there) == ((True, set()) if away else (False, state))
    assert ("its state on its way to disk" in here) is not away


def test_the_means_of_a_polish_take_half_where_cpu_memory_has_too_little_room(
    tiny_llama: Path, untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "measure_process", lambda: 1000)
    settings = tiny_settings(tiny_llama, calibration_windows=8)
    course = COURSE._replace(polishes=[64 * 7], polished_at=0.5)
    survivors, held = 15_360 // 2, MODEL + 1000 + 3 * STATE + 8 * STATE
    enough = held + 2 * 16 * survivors
    for size, workers, item in ((enough, "", 4), (enough - 1, "", 2), (enough, "2", 2), (10**12, "2", 4)):
        known = settings.model_copy(update={"workers": workers})
        found = estimate(known, course, target=0.5, devices=Devices(count=1, bytes=size))
        phase = next(phase for phase in found.phases if phase.name == POLISH)
        (line,) = [line for line in phase.device if line.what == "state of the optimiser"]
        assert (line.bytes, line.how) == (2 * item * survivors, f"2 means × {survivors:,} survivors × {item} bytes")
        (kept,) = [line for line in found.disk if line.what == "a polish under way"]
        assert kept.bytes == 2 * (8 + 2 * item) * survivors


@pytest.mark.parametrize(("memory", "item"), [(256e9, 4), (64e9, 2)])
def test_what_does_not_fit_a_gpu_is_smaller_where_it_does_not_fit_cpu_memory(
    memory: float, item: int, tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "find_devices", lambda _: read_devices("80"))
    monkeypatch.setattr("tools.estimate.room.count_memory", lambda: memory)
    course = COURSE._replace(polishes=[4096], polished_at=0.45)
    found = estimate(large_settings(write_config(tmp_path / "qwen3-8b", QWEN3_8B)), course, target=0.45)
    phase = next(phase for phase in found.phases if phase.name == POLISH)
    (line,) = [line for line in phase.host if line.what == "state of the optimiser"]
    assert line.bytes == 2 * item * 3_820_172_084  # what zeros leave of 6,945,767,424
