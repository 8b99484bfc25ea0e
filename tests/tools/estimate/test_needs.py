"""What a run will need: exact bytes for a tiny model, bounds that real tensors keep, and no weights read for it."""

import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.methods import METHODS, LayerStatistics, prune_levels, prune_weight
from tests.tiny import ARCHITECTURES, make_tiny_config, make_tiny_model, save_tiny_gguf, tiny_settings
from tools.base.errors import UserError
from tools.base.settings import TeamSettings
from tools.estimate import needs as module
from tools.estimate.needs import (
    ASKED_FOR,
    IN_ORDER,
    Devices,
    Estimate,
    Phase,
    estimate,
    print_estimate,
    read_devices,
    summarise,
)
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.models.readout import CHUNK, hidden_gradients, measure_losses
from tools.plans.layer_profile import LEVELS
from tools.statistics.collect import collect_statistics, work_alone
from tools.statistics.shards import share_out
from tools.statistics.walks import Walk, Walks
from tools.workbench import bench as workbench
from tools.workbench.bench import Workbench

QWEN3_8B = {
    **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
    **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    **{"tie_word_embeddings": False, "dtype": "bfloat16"},
}
LLAMA_70B = {
    **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672},
    **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False},
    **{"dtype": "bfloat16"},
}
PROGRAM = "Python, torch and transformers"

MODEL = 103_040  # 25,760 parameters
DENSE = 61_440  # 15,360 prunable weights
STATE = 64 * 32 * 4  # one window between two blocks
FLOW = 64 * 464 * 4  # what the seven layers of a block read and write: 64 + 48 + 48 + 64 + 80 + 80 + 80 numbers a token
LOGITS = 5 * 128 * 320 * 4
MATRICES = 5 * 48 * 48 * 4
MEMBERS = 15_360 // 2  # weights of one block
MOMENTS = 4 * (6 * 32 * 32 + 48 * 48)
LARGEST = 32 * 48 * 4


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    """A directory that holds a config.json and nothing else."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def sizes(phase: Phase) -> tuple[list[int], list[int]]:
    """Bytes of the lines on the device, and in CPU memory without the program itself."""
    return [line.bytes for line in phase.device], [line.bytes for line in phase.host if line.what != PROGRAM]


# --- the arithmetic --------------------------------------------------------------------------------------------


def test_memory_of_a_tiny_llama_on_the_cpu(tiny_llama: Path) -> None:
    found = estimate(tiny_settings(tiny_llama), target=0.45, rounds=3)
    always = [DENSE, 3 * STATE]  # 3 validation windows before the second block
    backward = [MODEL, 3 * FLOW, LOGITS, 2 * FLOW]
    evaluation = [MODEL, FLOW * 3 // 2, STATE, LOGITS]
    assert {phase.name: sizes(phase) for phase in found.phases} == {
        "load": ([MODEL], []),
        "validate the dense model": (evaluation, [*always, 2 * 3 * STATE]),
        "profile, statistics": (
            [MODEL, FLOW * 3 // 2, 3 * MOMENTS],  # of 4 windows in as many shards: two sums on the way, and a leaf
            [*always, 2 * 4 * STATE],
        ),
        "profile, gradients": (
            [*backward, LARGEST * 21 // 4],
            [*always, 2 * STATE, 2 * 2 * STATE],
        ),
        "KL curves of a method, where a plan asks for them": (
            [*backward, 19 * LARGEST, MATRICES],
            [*always, 2 * STATE, 2 * STATE],
        ),
        "prune": ([MODEL, 10 * LARGEST, MATRICES], always),
        "prune block by block, where a plan asks for it": (
            [MODEL, MOMENTS, 10 * LARGEST, MATRICES],
            [*always, 2 * 4 * STATE],
        ),
        "validate": (evaluation, [*always, 3 * 3 * STATE]),
        "export": ([MODEL], always),
    }
    program = {line.bytes for phase in found.phases for line in phase.host if line.what == PROGRAM}
    assert len(program) == 1 and program.pop() > 50_000_000
    assert all(phase.host[0].what == PROGRAM for phase in found.phases)


def test_memory_of_a_tiny_llama_in_bf16_on_a_gpu_that_is_not_here(tiny_llama: Path, no_gpu: None) -> None:
    found = estimate(tiny_settings(tiny_llama, dtype="bf16", device="cuda"), target=0.45, rounds=3)
    phases = {phase.name: sizes(phase) for phase in found.phases}
    assert phases["load"] == ([MODEL // 2], [MODEL, MODEL // 2])  # the file is fp32
    assert phases["profile, statistics"][0] == [
        *(MODEL // 2, FLOW // 2 * 3 // 2, 3 * MOMENTS),
        64 * 48 * 4,
    ]
    assert phases["profile, gradients"][0] == [
        *(MODEL // 2, 3 * FLOW // 2, LOGITS, 2 * FLOW // 2),
        2 * 64 * 80 * 4,  # inputs and output gradients of one layer in fp32
        LARGEST * 21 // 4,
    ]
    assert phases["export"] == ([MODEL // 2], [DENSE // 2, 3 * STATE // 2, MODEL // 2])


def test_formulas_are_what_they_come_to(tiny_llama: Path) -> None:
    for phase in estimate(tiny_settings(tiny_llama, dtype="bf16"), target=0.45, rounds=3).phases:
        for line in [*phase.device, *phase.host]:
            if re.match(r"\d", line.how) and "²" not in line.how:
                factors = [float(part.split()[0].replace(",", "")) for part in line.how.split(" × ")]
                assert math.prod(factors) == line.bytes, line


def test_layers_disk_and_work_of_a_tiny_llama(tiny_llama: Path) -> None:
    found = estimate(tiny_settings(tiny_llama), target=0.45, rounds=3, profiles=2, tests=3)
    assert (found.parameters, found.blocks, found.layers, found.weights) == (25_760, 2, 14, 15_360)
    assert (found.zeros, found.dense, found.device, list(found.speed)) == (6_912, [], "cpu", ["fp32"])
    assert [line.bytes for line in found.disk] == [*(2 * 4 * (6 * 32 * 32 + 48 * 48), 2 * 2 * STATE, 3 * DENSE, MODEL)]
    token, head = 2 * 15_360 + 2 * 2 * 64 * 32, 2 * 320 * 32
    squares = 2 * (6 * 32 * 32 + 48 * 48)
    refit = 2 * 2 * ((32 + 16 + 16 + 32 + 48 + 48) * 32 * 32 + 32 * 48 * 48)
    assert [(work.times, work.flops, work.dtype) for work in found.work] == [
        (1, 192 * (token + head), "fp32"),
        (2, 256 * token, "fp32"),
        (1, 2 * 256 * squares, "fp32"),
        (2, 3 * 128 * (token + head), "fp32"),
        (2, 2 * 128 * 15_360 * 6, "fp32"),
        (0, 3 * 128 * token + 2 * 128 * 15_360 * 5 + 5 / 3 * 13 * refit, "fp32"),
        (3, 13 * refit, "fp32"),
        (3, 192 * (token + 2 * head), "fp32"),
        (3, 128 * (token + head), "fp32"),
    ]
    assert found.seconds(found.work[0]) == 192 * (token + head) / found.speed["fp32"]
    assert Estimate.model_validate_json(found.model_dump_json()) == found


def test_no_more_gradient_windows_than_there_are_windows(tiny_llama: Path) -> None:
    def phases(gradient: int) -> list[tuple[list[int], list[int]]]:
        found = estimate(tiny_settings(tiny_llama, gradient_windows=gradient), target=0.45, rounds=1)
        return [sizes(phase) for phase in found.phases]

    assert phases(4) == phases(9) != phases(3)


def test_questions_are_work(tiny_llama: Path) -> None:
    settings = tiny_settings(tiny_llama, questions="hub:org/questions:train", question_pairs=5)
    found = estimate(settings, target=0.45, rounds=3, tests=3)
    (asked,) = [work for work in found.work if work.name == "ask questions"]
    assert asked.how == "forward of 5 questions of about 30 tokens with their answers"
    assert (asked.times, asked.flops) == (1 + 3 + 3, 5 * 30 * (2 * 15_360 + 2 * 2 * 64 * 32))


def test_peaks_are_those_of_the_greatest_phase(tiny_llama: Path) -> None:
    found = estimate(tiny_settings(tiny_llama), target=0.45, rounds=3)
    device, host = found.peak_device, found.peak_host
    assert device.device_bytes == max(sum(sizes(phase)[0]) for phase in found.phases)
    assert host.host_bytes == max(sum(line.bytes for line in phase.host) for phase in found.phases)
    assert (device.name, host.name) == ("KL curves of a method, where a plan asks for them", "validate")
    assert found.peak.bytes == max(phase.device_bytes + phase.host_bytes for phase in found.phases)


def test_fused_experts_are_counted_as_what_stays_dense(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "moe", make_tiny_config("qwen3_moe").to_dict())
    found = estimate(tiny_settings(directory), target=0.5, rounds=1)
    assert (found.layers, found.weights, found.zeros) == (8, 2 * (1024 + 512 + 512 + 1024), 3072)
    assert found.dense[:2] == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    # A token meets 2 of 4 experts of 16 features, and a router to 4: FLOPs and activations count these alone.
    experts = 2 * (2 * 2 * 16 * 32 + 2 * 16 * 32 + 4 * 32)
    assert found.work[1].flops == 256 * (2 * (found.weights + experts) + 2 * 2 * 64 * 32)
    assert found.phases[3].device[1].bytes == 3 * 64 * (64 + 48 + 48 + 64 + 2 * 2 * (32 + 32)) * 4
    assert f"stay dense: {len(found.dense)} weights such as {found.dense[0]}, no plain linear layers" in summarise(
        found
    )


def test_qwen3_8b_fits_a_gpu_of_80_gb(tmp_path: Path, no_gpu: None) -> None:
    directory = write_config(tmp_path / "qwen3-8b", QWEN3_8B)
    found = estimate(large_settings(directory), target=0.45, rounds=8)
    assert (found.parameters, found.blocks, found.layers) == (8_190_735_360, 36, 252)
    assert (found.weights, found.zeros) == (6_945_767_424, 3_125_595_341)
    assert found.phases[0].device_bytes == 2 * found.parameters
    assert found.phases[0].host_bytes == found.phases[0].host[0].bytes + 2 * found.parameters
    assert 2 * found.parameters < found.peak_device.device_bytes < 80e9
    gradients = next(phase for phase in found.phases if phase.name == "profile, gradients")
    flow = 2 * 2048 * (8192 + 5120 + 5120 + 8192 + 3 * 16384)
    assert gradients.device[1].bytes == 3 * flow and gradients.device[3].bytes == 16 * flow
    assert found.disk_bytes == (
        36 * 4 * (6 * 4096**2 + 12288**2)
        + 36 * 16 * 2048 * 4096 * 2
        + 3 * 2 * found.weights
        + 2 * found.parameters  # 104 GB
    )
    assert found.speed == {} and found.seconds(found.work[0]) is None


# --- workers -----------------------------------------------------------------------------------------------------


def test_memory_of_two_workers_of_a_tiny_llama(tiny_llama: Path) -> None:
    """4 calibration windows (2 of them with gradients) in 4 shards, and 3 validation windows; both on one CPU."""
    settings = tiny_settings(tiny_llama, workers="2", worker_threads=1)
    found = estimate(settings, target=0.45, rounds=3)
    assert (found.workers, found.threads) == (2, 1)
    kept = 2 * STATE  # 2 of the 3 validation windows before the second block
    evaluation = [MODEL, FLOW * 3 // 2, STATE, LOGITS]
    backward = [MODEL, 3 * FLOW, LOGITS, 2 * FLOW]  # one window, of two blocks
    job = [2 * MEMBERS * 4, MATRICES // 5]
    levels, packed = 5 * 4 * MEMBERS, DENSE + DENSE // 32
    assert {phase.name: sizes(phase) for phase in found.of_worker} == {
        "load": ([MODEL], []),
        "validate the dense model": (evaluation, [kept, 2 * 2 * STATE]),
        "profile, statistics": ([MODEL, FLOW * 3 // 2, 2 * MOMENTS], [kept, 2 * 2 * STATE]),
        "profile, gradients": ([*backward, LARGEST * 21 // 4], [kept, STATE, 2 * STATE]),
        ASKED_FOR: ([*backward, 19 * LARGEST, MATRICES], [kept, STATE, STATE, *job, levels]),
        "prune": ([MODEL, 10 * LARGEST, MATRICES], [kept, *job]),
        IN_ORDER: ([MODEL, 10 * LARGEST, MATRICES], [kept, 2 * 2 * STATE, *job]),
        "validate": (evaluation, [kept, packed, 3 * STATE, 2 * 2 * STATE]),
        "export": ([MODEL], [kept]),
    }
    matrix, given = MATRICES // 5, [DENSE, 4 * (MATRICES // 5)]
    results = MEMBERS * 33 // 8
    assert {phase.name: (*sizes(phase), [line.bytes for line in phase.store]) for phase in found.phases} == {
        "load": ([MODEL], [], []),
        "validate the dense model": ([MODEL], [DENSE, 2 * 3 * STATE], [3 * STATE]),
        "profile, statistics": ([MODEL], [DENSE, 2 * MOMENTS], [4 * MOMENTS]),
        "profile, gradients": ([MODEL], [DENSE], []),
        ASKED_FOR: ([MODEL, matrix], [DENSE], [*given, levels]),
        "prune": ([MODEL, matrix], [DENSE], [*given, results]),
        IN_ORDER: ([MODEL, matrix], [DENSE, 2 * MOMENTS], [*given, results, 4 * MOMENTS]),
        "validate": ([MODEL], [DENSE, 3 * STATE], [DENSE, packed, 3 * STATE]),
        "export": ([MODEL], [DENSE], [DENSE]),
    }
    whole = {p.name: p.bytes + 2 * w.bytes + p.store_bytes for p, w in zip(found.phases, found.of_worker, strict=True)}
    assert {phase.name: found.count_host(phase) for phase in found.phases} == whole
    assert found.needed[0] == max(whole.values())
    assert Estimate.model_validate_json(found.model_dump_json()) == found


def test_a_worker_on_a_gpu_hands_over_by_way_of_the_cpu(tiny_llama: Path, no_gpu: None) -> None:
    found = estimate(tiny_settings(tiny_llama, device="cuda", workers="2"), target=0.45, rounds=3)
    workers = {phase.name: phase for phase in found.of_worker}
    assert sizes(workers["profile, statistics"])[1] == [2 * STATE, 2 * 2 * STATE, MOMENTS]
    assert sizes(workers["load"]) == ([MODEL], [MODEL])
    first = {p.name: p.device_bytes + workers[p.name].device_bytes for p in found.phases}
    assert found.needed == (first[ASKED_FOR], ASKED_FOR) and first[ASKED_FOR] == max(first.values())


def test_the_busiest_worker_says_how_long_it_takes(tiny_llama: Path) -> None:
    def find(workers: str) -> Estimate:
        settings = tiny_settings(
            tiny_llama, workers=workers, worker_threads=1, calibration_windows=16, questions="hub:org/q:train"
        )
        return estimate(settings, target=0.45, rounds=3, tests=3)

    alone, shared = find(""), find("3")
    assert {work.share for work in alone.work} == {1.0}
    assert [work.flops for work in shared.work] == [work.flops for work in alone.work]
    most = 32 * 48 * 48 / (2 * ((32 + 16 + 16 + 32 + 48 + 48) * 32 * 32 + 32 * 48 * 48))  # one down_proj
    layers = pytest.approx(1 / 3 + 2 / 3 * most)
    assert {work.name: work.share for work in shared.work} == {
        "validate the dense model": 1 / 3,
        **dict.fromkeys(["profile, statistics", "profile, second moments"], 6 / 16),  # 3 of 8 shards
        **dict.fromkeys(["profile, gradients", "profile, scores and KL curves"], 1 / 2),  # 1 of 2 windows
        ASKED_FOR: 1 / 2,
        "prune": layers,
        "validate": 1 / 3,
        "ask questions": 1 / 3,
        "test": 1 / 2,
    }
    assert shared.seconds(shared.work[1]) == 6 / 16 * shared.work[1].flops / shared.speed["fp32"]
    many = find("20").work  # no more than the shards
    assert (many[1].share, many[3].share, many[0].share) == (1 / 8, 1 / 2, 1 / 3)


@pytest.mark.parametrize("workers", ["auto", "ray://head:10001"])
def test_a_cluster_is_not_asked(tiny_llama: Path, workers: str) -> None:
    with pytest.raises(UserError, match=rf"^how many workers {workers} has is not asked here; give their number, such"):
        estimate(tiny_settings(tiny_llama, workers=workers), target=0.45, rounds=1)


# --- the machine that is planned for -----------------------------------------------------------------------------


def large_settings(directory: Path, **changes: Any) -> TeamSettings:
    windows = {"calibration_windows": 128, "gradient_windows": 16, "validation_windows": 64, "test_windows": 136}
    return tiny_settings(directory, **{"dtype": "bf16", "device": "cuda", "window": 2048, **windows, **changes})


def test_qwen3_8b_on_eight_gpus(tmp_path: Path, no_gpu: None) -> None:
    settings = large_settings(write_config(tmp_path / "qwen3-8b", QWEN3_8B), workers="8")
    lines = summarise(estimate(settings, target=0.45, rounds=8, devices=read_devices("8x80")))
    assert "each of 8 workers: peak memory of the GPU: 26.1 GB (KL curves of a method, where a plan asks for them)" in (
        lines
    )
    assert any(line.startswith("each of 8 workers: peak memory of the CPU: 1") for line in lines)
    assert "peak of Ray's object store: 40.1 GB (prune block by block, where a plan asks for it)" in lines
    assert (
        "fits one GPU of 80.0 GB: 43.0 GB at most (KL curves of a method, where a plan asks for them, with this "
        "process and a worker on the first)" in lines
    )
    assert lines[-1].startswith("work: up to ") and "by the busiest worker; no time can be" in lines[-1]
    few = summarise(estimate(settings, target=0.45, rounds=8, devices=read_devices("4x80")))
    assert any(line.startswith("8 workers need as many GPUs, but there are 4; fits one GPU") for line in few)


def test_llama_70b_over_eight_gpus(tmp_path: Path, no_gpu: None) -> None:
    directory = write_config(tmp_path / "70b", LLAMA_70B)

    def find(device: str, devices: str) -> Estimate:
        settings = large_settings(directory, device=device)
        return estimate(settings, target=0.45, rounds=8, devices=read_devices(devices))

    spread = find("spread", "8x80")
    assert (spread.parameters, spread.blocks, spread.layers) == (70_553_706_496, 80, 560)
    block = 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192)
    head = 2 * 128256 * 8192
    assert [(line.what, line.how, line.bytes) for line in spread.spread] == [
        ("GPU 0", "9 blocks, model.embed_tokens", 9 * block + head),
        *((f"GPU {i}", "11 blocks", 11 * block) for i in range(1, 7)),
        ("GPU 7", "5 blocks, model.norm, model.rotary_emb, lm_head", 5 * block + head + 2 * 8192),
    ]
    assert {phase.device[0].bytes for phase in spread.phases} == {11 * block}
    assert [line.what for line in spread.phases[0].host] == [PROGRAM], "no weight passes through CPU memory"
    statistics = next(phase for phase in spread.phases if phase.name == "profile, statistics")
    assert statistics.device[2].bytes == 4 * 4 * (6 * 8192**2 + 28672**2)
    assert "fits each of 8 GPUs of 80.0 GB: 70.9 GB at most (KL curves of a method, where a plan asks for them)" in (
        summarise(spread)
    )
    text = show(spread, width=80)
    assert text.startswith("the model over 8 GPUs\n  GPU 0; 9 blocks, model.embed_tokens; 17.5 GB\n")
    assert "\nload: 18.8 GB on one GPU, " in text

    assert (
        "does not fit one GPU of 80.0 GB: 193.2 GB (KL curves of a method, where a plan asks for them), 141.1 GB of it "
        "the model; --device spread lays its blocks over several GPUs, at least 6 of these"
    ) in summarise(find("cuda", "80"))
    assert (
        "does not fit each of 2 GPUs of 80.0 GB: 122.6 GB (KL curves of a method, where a plan asks for them); fewer "
        "or shorter windows need less, or more GPUs hold less each"
    ) in summarise(find("spread", "2x80"))
    with pytest.raises(
        UserError, match=r"^the model's 141\.1 GB do not fit the GPUs, which have 80\.0 GB free in all: "
    ):
        find("spread", "80")
    with pytest.raises(
        UserError, match=r"^torch sees no GPU here to spread the model over; plan for others with --dev"
    ):
        estimate(large_settings(directory, device="spread"), target=0.45, rounds=8)


def test_memory_of_this_machine_where_the_cpu_is_the_device(tiny_llama: Path) -> None:
    found = estimate(tiny_settings(tiny_llama), target=0.45, rounds=3)
    assert found.devices is not None and found.devices.bytes > 1e9
    size = module._size
    most = found.peak
    (line,) = [line for line in summarise(found) if line.startswith("fits ")]
    assert line == f"fits this memory of {size(found.devices.bytes)}: {size(most.bytes)} at most ({most.name})"
    small = found.model_copy(update={"devices": Devices(count=1, bytes=1000)})
    (line,) = [line for line in summarise(small) if line.startswith("does not fit ")]
    assert line.endswith("; fewer or shorter windows need less")


def test_a_gpu_that_is_a_little_too_small(tmp_path: Path, no_gpu: None) -> None:
    settings = large_settings(write_config(tmp_path / "qwen3-8b", QWEN3_8B))
    lines = summarise(estimate(settings, target=0.45, rounds=8, devices=read_devices("24")))
    (line,) = [line for line in lines if line.startswith("does not fit ")]
    assert line.startswith("does not fit one GPU of 24.0 GB: 31.7 GB (")
    assert line.endswith(
        "), 16.4 GB of it the model; fewer or shorter windows need less; --device spread lays its blocks over several "
        "GPUs, at least 2 of these"
    )


@pytest.mark.parametrize(("text", "count", "size"), [("80", 1, 80e9), ("8x80", 8, 80e9), ("2x23.5", 2, 23.5e9)])
def test_devices_of_another_machine(text: str, count: int, size: float) -> None:
    assert read_devices(text) == Devices(count=count, bytes=int(size))


@pytest.mark.parametrize("text", ["", "0", "0x80", "8x", "x80", "80GB", "8X80", "-1", "8x80x2", "1e3", "8x0.0"])
def test_no_such_devices(text: str) -> None:
    with pytest.raises(UserError) as caught:
        read_devices(text)
    assert str(caught.value) == f"device memory {text!r} is neither GB, such as 80, nor COUNTxGB, such as 8x80"


# --- what it must agree with -----------------------------------------------------------------------------------


def test_the_workbench_asks_for_the_same_disk_and_keeps_as_many_block_inputs(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tiny_llama)
    found = estimate(settings, target=0.45, rounds=1)
    room = shutil.disk_usage(tmp_path)

    def open_with(free: int) -> Workbench:
        monkeypatch.setattr(workbench.shutil, "disk_usage", lambda _place: room._replace(free=free))
        return Workbench(settings, tmp_path, lambda text: None, lambda *step: None)

    with pytest.raises(UserError, match=r"^the disk is full: "):
        open_with(found.disk_bytes - 1)
    bench = open_with(found.disk_bytes)
    kept = next(line for line in found.phases[1].host if line.what.startswith("inputs of every few blocks"))
    assert kept.bytes == len(bench.losses.prefix.kept) * 3 * STATE > 0


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # a view of what is counted already, or was made before
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_walk_through_the_text_holds_no_more_than_said(workers: int, tmp_path: Path) -> None:
    """Of a model whose second moments are most of what is held: all shards here, or those of the busiest worker."""
    config = make_tiny_config("llama")
    config.intermediate_size, config.num_hidden_layers = 768, 3
    model = type(make_tiny_model("llama"))(config).eval().requires_grad_(False)
    layers, blocks = find_layers(model), Blocks(model)
    settings = tiny_settings(
        write_config(tmp_path / "wide", config.to_dict()),
        **{"workers": str(workers or ""), "window": 16, "calibration_windows": 8, "gradient_windows": 8},
    )
    ids_BT = torch.randint(0, 320, (8, 16), generator=torch.Generator().manual_seed(0))
    blocks.embed(ids_BT[0])  # looks at what blocks return
    found = estimate(settings, target=0.5, rounds=1)
    said = {phase.name: phase for phase in (found.of_worker if workers else found.phases)}

    def bound(name: str) -> int:
        held = {"the model", PROGRAM, "dense copy of the prunable layers"}
        lines = [*said[name].device, *said[name].host]
        return sum(x.bytes for x in lines if x.what not in held and not x.what.startswith("inputs of every few"))

    known = {x.name: (torch.empty(0), *(torch.ones(n) for n in reversed(x.weight_OI.shape))) for x in layers}
    up, down, walk = 0, 0, Walk(0, "run")
    for span in share_out(8, max(workers, 1)):
        walks = Walks(blocks, layers, ids_BT, 8, 0, tmp_path, ahead=int(workers > 0))
        with LiveTensors() as live:
            for block in range(3):
                walks.moments(span, walk, block, True, "profile")
        up = max(up, live.peak)
        with LiveTensors() as live:
            for block in (2, 1, 0):
                walks.gradients(span, walk, block)
                if workers and block > 0:  # the next one's are asked for before
                    walks.gradients(span, walk, block - 1)
                walks.mask_curves(span, walk, block, {x.name: known[x.name] for x in layers if x.block == block})
        down = max(down, live.peak)
    assert 0.9 * bound("profile, statistics") < up <= bound("profile, statistics")
    assert 0.4 * bound("profile, gradients") < down <= bound("profile, gradients")
    if not workers:
        team, extent = work_alone(blocks, layers, ids_BT, 8, 0, tmp_path)
        with LiveTensors() as live:
            collect_statistics(team, extent, layers, lambda *_: None, lambda name, moment_II: None)
        own = sum(4 * (layer.weight_OI.shape[1] + 2 * layer.weight_OI.shape[0]) for layer in layers)  # what it is for
        assert live.peak <= max(bound("profile, statistics"), bound("profile, gradients")) + own


def make_layer(outputs: int, inputs: int) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(4 * inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    moment_II = x_TI.T @ x_TI / len(x_TI)
    gamma_O = torch.rand(outputs, generator=generator)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    return weight_OI, LayerStatistics(moment_II.diagonal().clone(), gamma_O, moment_II)


@pytest.mark.parametrize("shape", [(384, 384), (768, 192), (192, 768)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refit", [False, True])
def test_pruning_a_layer_holds_no_more_than_said(method: str, refit: bool, shape: tuple[int, int]) -> None:
    weight_OI, statistics = make_layer(*shape)
    size, matrix = 4 * weight_OI.numel(), 4 * shape[1] ** 2
    beside = (module.PRUNE_MATRICES - 1) * matrix  # the second moment itself was made before
    with LiveTensors() as live:
        prune_weight(method, weight_OI, statistics, weight_OI.numel() * 45 // 100, refit=refit)
    assert 2 * size < live.peak <= module.PRUNE_WEIGHTS * size + beside
    zeros = [round(level * weight_OI.numel()) for level in LEVELS]
    with LiveTensors() as live:
        prune_levels(method, weight_OI, make_layer(*shape)[1], zeros, refit=refit)
    assert live.peak <= module.LEVELS_WEIGHTS * size + beside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_block_holds_no_more_than_said(architecture: str, dtype: torch.dtype) -> None:
    config = make_tiny_config(architecture)
    model = type(make_tiny_model(architecture))(config).to(dtype).eval().requires_grad_(False)
    blocks, ids_T = Blocks(model), torch.randint(0, 320, (256,), generator=torch.Generator().manual_seed(0))
    layers = [layer for layer in find_layers(model) if layer.block == 0]
    flow = 256 * sum(sum(layer.weight_OI.shape) for layer in layers) * dtype.itemsize
    x_BTD = blocks.embed(ids_T).clone()
    with LiveTensors() as live, torch.no_grad():
        blocks.run(ids_T, 0, x_BTD)
    assert 0.4 * flow < live.peak <= module.FORWARD * flow
    x_BTD.requires_grad_()
    with LiveTensors() as live:
        y_BTD = blocks.run(ids_T, 0, x_BTD)
        torch.autograd.grad(y_BTD, x_BTD, torch.ones_like(y_BTD))
    assert 0.8 * flow < live.peak <= module.GRAPH * flow


def test_a_chunk_of_logits_holds_no_more_than_said() -> None:
    config = make_tiny_config("llama")
    config.vocab_size = 8000
    model = type(make_tiny_model("llama"))(config).eval().requires_grad_(False)
    ids_T = torch.randint(0, 320, (2 * CHUNK,), generator=torch.Generator().manual_seed(0))
    hidden_TD = torch.randn(2 * CHUNK, 32)
    chunk = CHUNK * 8000 * 4
    with LiveTensors() as live:
        hidden_gradients(model, ids_T, hidden_TD, torch.Generator())
    assert 2 * chunk < live.peak <= module.LOGITS * chunk
    with LiveTensors() as live:
        measure_losses(model, ids_T, hidden_TD)
    assert 4 * chunk < live.peak <= module.LOGITS * chunk * 1.05


# --- where the config comes from -------------------------------------------------------------------------------


def test_a_config_alone_says_the_same_as_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    directory = write_config(tmp_path / "shape", json.loads((tiny_llama / "config.json").read_text()))
    expected = estimate(tiny_settings(tiny_llama), target=0.45, rounds=3)
    for model in (directory, directory / "config.json"):
        found = estimate(tiny_settings(model), target=0.45, rounds=3)
        assert [sizes(phase) for phase in found.phases] == [sizes(phase) for phase in expected.phases]
        assert (found.disk, found.work) == (expected.disk, expected.work)


def test_a_gguf_file_is_not_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")

    def refuse(*_arguments: Any) -> Any:
        raise AssertionError("weights are being read")

    monkeypatch.setattr("gguf.dequantize", refuse)
    found = estimate(tiny_settings(path), target=0.45, rounds=3)
    assert (found.parameters, found.layers, found.weights) == (25_760, 14, 15_360)
    assert sizes(found.phases[0]) == ([MODEL], [path.stat().st_size + 320 * 32 * 4])


def test_no_memory_is_taken_for_weights(tmp_path: Path) -> None:
    config = QWEN3_8B | {"hidden_size": 65536, "num_hidden_layers": 100}  # 1.5e12 parameters
    model, _ = module.build_empty(tiny_settings(write_config(tmp_path / "huge", config)))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("nowhere.json", r"model config nowhere\.json does not exist; give the path of a config\.json"),
        ("no-such/model", r"model 'no-such/model' could not be built from its config: We couldn't connect to .*"),
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
        estimate(tiny_settings(model), target=0.45, rounds=1)


# --- what is shown ---------------------------------------------------------------------------------------------


def show(found: Estimate, **options: Any) -> str:
    console = Console(file=io.StringIO(), **options)
    print_estimate(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_without_a_terminal(tiny_llama: Path, no_gpu: None) -> None:
    found = estimate(tiny_settings(tiny_llama, dtype="bf16", device="cuda"), target=0.45, rounds=3, tests=3)
    lines = show(found, width=20).splitlines()
    assert lines[0] == "memory, in all phases but load"
    assert lines[1] == "  the model; all parameters, each once; GPU; 51.5 kB"
    assert "  dense copy of the prunable layers; each is pruned from it; CPU; 30.7 kB" in lines
    assert any(re.fullmatch(r"prune: 159\.0 kB on the GPU, [\d.]+ [MG]B in CPU memory", line) for line in lines)
    assert "  one layer being pruned; 10 copies × 1,536 weights of the largest layer × 4 bytes; GPU; 61.4 kB" in lines
    assert f"disk: {(67_584 + 16_384 + 3 * DENSE // 2 + MODEL // 2) / 1e3:.1f} kB" in lines
    assert "  second moments; 4 bytes × inputs², over 14 layers; 67.6 kB" in lines
    assert "  prune; 14 layers by the method refit, 13 products each; other methods cost less; 3 ×; 14.1 MFLOP" in lines
    assert lines[-8:-1] == [
        "",
        f"{tiny_llama}, bf16 on cuda: 25,760 parameters, 2 blocks",
        "prunable: 14 layers, 15,360 weights; 6,912 zeros at the end",
        f"peak memory of the GPU: {found.peak_device.device_bytes / 1e6:.1f} MB "
        "(KL curves of a method, where a plan asks for them)",
        lines[-4],
        "whether that fits: torch sees no GPU here; say what there is with --device-memory, such as 80 or 8x80",
        "disk: 227.6 kB",
    ]
    assert re.fullmatch(r"peak memory of the CPU: [\d.]+ [MG]B \(load\)", lines[-4])
    total = sum(work.times * work.flops for work in found.work)
    assert lines[-1] == f"work: up to {total / 1e6:.1f} MFLOP; no time can be predicted, as torch sees no GPU here"


def test_a_table_on_a_terminal(tiny_llama: Path) -> None:
    found = estimate(tiny_settings(tiny_llama), target=0.45, rounds=3)
    text = show(found, force_terminal=True, width=150, color_system=None)
    for phase in found.phases:
        for line in [*phase.device, *phase.host]:
            assert line.what in text
    assert max(map(len, text.splitlines()[:-5])) <= 150
    assert re.search(r"peak memory: [\d.]+ [MG]B \(", text)
    assert re.search(r"work: up to [\d.]+ MFLOP, [\d.]+ seconds at the speed of one product here, [\d.]+ .FLOP/s", text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.1e9, "2.1 GB"), (3e12, "3000.0 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert module._size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 seconds"), (90, "1.5 minutes"), (9000, "2.5 hours")])
def test_durations(seconds: float, text: str) -> None:
    assert module._duration(seconds) == text
