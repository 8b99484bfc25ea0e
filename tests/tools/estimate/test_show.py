"""What is shown: every line of the arithmetic, then the peaks, whether there is room, and the time."""

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from billhook_kernels.packed import PADDING
from tests.tiny import make_tiny_config, tiny_settings
from tests.tools.estimate.helpers import DENSE, LLAMA_70B, MODEL, QWEN3_8B, write_config
from tests.tools.estimate.test_needs import COURSE, find, find_large
from tools.base.words import show_flops, show_seconds, show_size
from tools.estimate.needs import Estimate, estimate
from tools.estimate.phases import ASKED_FOR, IN_ORDER
from tools.estimate.room import Devices
from tools.estimate.show import print_estimate, summarise
from tools.models.artifacts import HEADER


def show(found: Estimate, **options: Any) -> str:
    console = Console(file=io.StringIO(), **options)
    print_estimate(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_without_a_terminal(tiny_llama: Path, no_gpu: None, untimed: None) -> None:
    found = find(tiny_llama, dtype="bf16", device="cuda")
    lines = show(found, width=20).splitlines()
    assert lines[0] == "memory, in all phases but load"
    assert lines[1] == "  the model; all parameters, each once; GPU; 51.5 kB"
    pruned = next(phase for phase in found.phases if phase.name == "prune")
    gpu = show_size(pruned.device_bytes)
    assert any(re.fullmatch(rf"prune: {gpu} on the GPU, [\d.]+ [MG]B in CPU memory", line) for line in lines)
    layer = show_size(pruned.device[1].bytes)
    counted = "counted in a run of it on a smaller layer of the same form"
    assert f"  one layer being pruned; {counted}; GPU; {layer}" in lines
    assert "  its second moment; 48 inputs × 48 inputs × 4 bytes; GPU; 9.2 kB" in lines
    layers = DENSE // 2 + 4 * 2 * (192 + 32 * 2) + 14 * (2 * PADDING + HEADER)  # rows of one mask word, and of two
    assert f"disk: {(DENSE // 2 + 67_584 + 16_384 + 5 * layers + MODEL // 2) / 1e3:.1f} kB" in lines
    mapped = "each is pruned from them; mapped into memory while there is room"
    assert f"  the dense weights of the prunable layers; {mapped}; 30.7 kB" in lines
    assert "  second moments; 4 bytes × the upper half of inputs², over 14 layers; 67.6 kB" in lines
    assert "  prune; 14 layers by two-sided; 1 ×" in lines
    assert any(re.fullmatch(r"  prune; 14 layers by refit; 1 ×; [\d.]+ MFLOP", line) for line in lines)
    most = max(phase.device_bytes for phase in found.phases)
    assert lines[-9:-1] == [
        "",
        f"{tiny_llama}, bf16 on cuda: 25,760 parameters, 2 blocks",
        "prunable: 14 layers, 15,360 weights; 6,912 zeros at the end",
        f"peak memory of the GPU: {show_size(most)} ({found.needed[1]})",
        lines[-5],
        "whether that fits: torch sees no GPU here; say what there is with --device-memory, such as 80 or 8x80",
        "disk: 370.4 kB",
        lines[-2],
    ]
    assert re.fullmatch(r"peak memory of the CPU: [\d.]+ [MG]B \(load\)", lines[-5])
    ways = r"second moments: kept; with 336\.6 kB of disk they are collected anew by every round, for [\d.]+ MFLOP more"
    assert re.fullmatch(ways, lines[-2]), lines[-2]
    total = show_flops(sum(work.times * work.flops for work in found.work))
    at = "0.0 s at 100.0 TFLOP a second"
    assert lines[-1] == f"work: about {total}, {at}; no time can be predicted, as this test has no time"
    assert "TFLOP" not in show(find(tiny_llama))


def test_second_moments_that_the_disk_has_no_room_for(tiny_llama: Path, tmp_path: Path, untimed: None) -> None:
    kept = find(tiny_llama)
    found = find(tiny_llama, disk=(kept.disk_bytes - 1) / 1e9)
    assert (found.disk_bytes, found.other_disk, found.at_once) == (kept.other_disk, kept.disk_bytes, 1)
    assert (found.work, found.other_work) == (kept.other_work, kept.work)
    more = sum(x.times * x.flops for x in found.work) - sum(x.times * x.flops for x in kept.work)
    ways = [line for line in summarise(found) if line.startswith("second moments")]
    assert ways == [
        f"second moments: collected anew by every round, of 1 block at a time; {show_size(kept.disk_bytes)} of disk "
        f"would save {show_flops(more)}"
    ]
    held, before = ({phase.name: phase for phase in x.phases} for x in (found, kept))
    program = "Python, torch and transformers"  # measured once more
    added = {
        name: [
            line.what
            for line in [*x.device, *x.host]
            if line not in [*before[name].device, *before[name].host] and line.what != program
        ]
        for name, x in held.items()
    }
    assert added["prune"] == added[ASKED_FOR] == ["second moments of one block", "inputs of one block"]
    assert {name for name, lines in added.items() if lines} == {"prune", ASKED_FOR}
    line = "  second moments, of some blocks at a time; 4 bytes × the upper half of inputs², of 1 block; "
    assert line in show(found)
    streamed = summarise(find(tiny_llama, device="stream", disk=(kept.disk_bytes - 1) / 1e9))
    assert any(re.search(r"would save [\d.]+ MFLOP and [\d.]+ kB of reading$", line) for line in streamed)
    on_gpu = find_large(write_config(tmp_path / "qwen3-8b", QWEN3_8B), "24", device="stream")
    (flow,) = [phase for phase in on_gpu.phases if phase.name == ASKED_FOR]
    what = "inputs and output gradients of one block's layers"
    assert what in {line.what for line in flow.host} and what not in {line.what for line in flow.device}
    assert "those of one layer" in {line.what for line in flow.device}
    (in_order,) = [phase for phase in on_gpu.phases if phase.name == IN_ORDER]
    what = "second moments of one block"
    assert what in {line.what for line in in_order.host} and what not in {line.what for line in in_order.device}
    masks = estimate(tiny_settings(tiny_llama), COURSE._replace(rounds=COURSE.rounds[:1]), target=0.45)
    assert not any(line.startswith("second moments") for line in summarise(masks)), "they are no work"


def test_a_table_on_a_terminal(tiny_llama: Path) -> None:
    found = find(tiny_llama)
    text = show(found, force_terminal=True, width=150, color_system=None)
    for phase in found.phases:
        for line in [*phase.device, *phase.host]:
            assert line.what in text
    assert max(map(len, text.splitlines()[:-5])) <= 150
    assert re.search(r"peak memory: [\d.]+ [MG]B \(", text)
    assert re.search(
        r"work: about [\d.]+ .FLOP, [\d.]+ s without loading the model, as one block took here on 64 tokens", text
    )


def test_what_stays_dense_is_named(tmp_path: Path, untimed: None) -> None:
    found = find(write_config(tmp_path / "moe", make_tiny_config("qwen3_moe").to_dict()))
    said = (
        "stay dense: 1.37% of the weights in the blocks, such as model.layers.*.mlp.gate.weight, no plain linear layers"
    )
    assert said in summarise(found)


def test_the_memory_of_this_machine(tiny_llama: Path, untimed: None) -> None:
    found = find(tiny_llama)
    assert found.devices is not None and found.devices.bytes > 1e9
    most = max(found.phases, key=lambda phase: phase.bytes)
    (line,) = [line for line in summarise(found) if line.startswith("fits ")]
    needs = show_size(most.bytes)
    assert line == f"fits this memory of {show_size(found.devices.bytes)}: {needs} at most ({most.name})"
    small = found.model_copy(update={"devices": Devices(count=1, bytes=1000)})
    (line,) = [line for line in summarise(small) if line.startswith("does not fit ")]
    assert line.endswith("; fewer or shorter windows need less, and --device stream")


def test_a_model_that_is_streamed(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    config = write_config(tmp_path / "qwen3-8b", QWEN3_8B)
    whole, found = find_large(config, "24"), find_large(config, "24", device="stream")
    lines = summarise(found)
    passes = sum(work.times * work.passes for work in found.work)
    (told,) = [line for line in lines if line.startswith("streamed: one block of the model at a time comes from disk")]
    size, took = show_size(passes * found.streamed), show_seconds(passes * found.streamed / 1e9)
    assert f"all of them about {passes} times: {size}, {took} at 1.0 GB a second" in told and not whole.streamed
    assert any(re.fullmatch(r"fits one GPU of 24\.0 GB: 6\.\d GB at most \(.+\)", line) for line in lines)
    block = 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128)
    outside = (2 * 151_936 * 4096 + 4096) * 2
    assert found.streamed == 36 * block
    norm, head = 4096 * 2, 151_936 * 4096 * 2
    assert {phase.device[0].bytes for phase in found.phases} == {max(block, head) + norm}
    (passing,) = [line.bytes for line in found.disk if line.what == "a validation under way"]
    (waiting,) = [line.bytes for line in found.disk if line.what == "sums of second moments that wait for others"]
    assert waiting == 2 * 4 * (6 * 4096**2 + 12_288**2)
    (walking,) = [line.bytes for line in found.disk if line.what == "a walk of the calibration text under way"]
    assert found.disk_bytes - whole.disk_bytes == 36 * block + outside + passing + walking + waiting, "as it is now"
    assert max(phase.host_bytes for phase in found.phases) < max(phase.host_bytes for phase in whole.phases) / 3
    streamed = [bool(find_large(config, memory, device="auto").streamed) for memory in ("12", "24", "64")]
    assert streamed == [True, True, False], "16.4 GB are the model's weights"


def test_a_model_of_70_billion_weights_on_a_small_gpu(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    config = write_config(tmp_path / "70b", LLAMA_70B)
    found = find_large(config, "24", device="stream")
    told = r"fits one GPU of 24\.0 GB: \d\d\.\d GB at most \(KL curves of .+\)"
    assert any(re.fullmatch(told, line) for line in summarise(found))
    assert found.phases[0].device_bytes == (128_256 + 1) * 8192 * 2, "the head is more than a block"


def test_workers_that_stream(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    config = write_config(tmp_path / "qwen3-8b", QWEN3_8B)
    alone, found = (find_large(config, "8x24", device="stream", workers=n) for n in ("", "8"))
    block = found.streamed // 36
    outside = (2 * 151_936 * 4096 + 4096) * 2
    held = [next(x.bytes for x in p.device if "streamed" in x.what) for p in [*found.phases, *found.of_worker]]
    assert set(held) == {151_936 * 4096 * 2 + 4096 * 2}, "each the head, which is more than a block, and a norm"
    now = next(line for line in found.disk if line.what == "the model as it is now")
    assert (now.how, now.bytes) == ("9 processes × all parameters", 9 * (36 * block + outside))
    under_way = [line.what for line in found.disk if line.what.endswith("under way")]
    assert under_way == ["a validation under way", "a walk of the calibration text under way"]
    lines = [line for phase in found.of_worker for line in [*phase.device, *phase.host]]
    assert max(line.bytes for line in lines) < found.streamed / 2, "none holds the model, or all that changed of it"
    steps = {(work.name, work.how): (work.passes, 8 if work.share < 1 else 1) for work in found.work}
    assert steps.keys() == {(work.name, work.how) for work in alone.work}
    assert {name for (name, _), (_, times) in steps.items() if times == 1} == {"load, check and export the model"}
    passes = sum(work.times * math.prod(steps[work.name, work.how]) for work in found.work)
    said = summarise(found)
    told = f"disk, all of them about {passes} times for 8 workers and this process: {show_size(passes * 36 * block)}, "
    assert any(told in line for line in said)
    assert any(re.fullmatch(r"fits one GPU of 24\.0 GB: 8\.\d GB at most \(.+\)", line) for line in said)


def test_auto_streams_where_the_models_of_all_processes_do_not_fit(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    """Of 16.4 GB each, nine of them, and what a run holds beside."""
    config = write_config(tmp_path / "qwen3-8b", QWEN3_8B)
    for memory, streamed in (("180", True), ("230", True), ("400", False)):
        found = find_large(config, memory, device="auto", workers="8")
        assert (found.device, bool(found.streamed)) == ("cpu", streamed), memory


def test_a_gpu_that_is_a_little_too_small(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    lines = summarise(find_large(write_config(tmp_path / "qwen3-8b", QWEN3_8B), "24"))
    (line,) = [line for line in lines if line.startswith("does not fit ")]
    assert re.match(r"does not fit one GPU of 24\.0 GB: 25\.\d GB \(", line)
    assert line.endswith(
        "), 16.4 GB of it the model; fewer or shorter windows need less; --device spread lays its blocks over several "
        "GPUs, at least 2 of these, stream holds one at a time"
    )


def test_eight_workers_on_eight_gpus(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    directory = write_config(tmp_path / "qwen3-8b", QWEN3_8B)
    lines = summarise(find_large(directory, "8x80", workers="8"))
    asked = r"\(KL curves of a method, where a plan asks for them"
    text = "\n".join(lines)
    assert re.search(rf"^each of 8 workers: peak memory of the GPU: 2\d\.\d GB {asked}\)$", text, re.MULTILINE)
    assert re.search(r"^each of 8 workers: peak memory of the CPU: 1", text, re.MULTILINE)
    assert "peak of Ray's object store: 40.1 GB (prune block by block, where a plan asks for it)" in lines
    beside = "with this process and a worker on the first"
    assert re.search(rf"^fits one GPU of 80\.0 GB: 39\.\d GB at most {asked}, {beside}\)$", text, re.MULTILINE)
    work = r"work: about [\d.]+ PFLOP, [\d.]+ PFLOP of it by the busiest worker, "
    assert re.match(rf"{work}\d+\.\d s at 100\.0 TFLOP a second; no time ", lines[-1]), lines[-1]
    few = summarise(find_large(directory, "4x80", workers="8"))
    assert any(line.startswith("8 workers need as many GPUs, but there are 4; fits one GPU") for line in few)


def test_a_model_over_eight_gpus(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    directory = write_config(tmp_path / "70b", LLAMA_70B)
    spread = find_large(directory, "8x80", device="spread")
    assert (spread.parameters, spread.blocks, spread.layers) == (70_553_706_496, 80, 560)
    text = show(spread, width=80)
    assert text.startswith("the model over 8 GPUs\n  GPU 0; 9 blocks, model.embed_tokens; 17.5 GB\n")
    assert "\nload: 18.8 GB on one GPU, " in text
    assert re.search(r"\nfits each of 8 GPUs of 80\.0 GB: 4\d\.\d GB at most \(KL curves of a method", text)
    alone = "\n".join(summarise(find_large(directory, "80")))
    assert re.search(r"does not fit one GPU of 80\.0 GB: 17\d\.\d GB \(", alone)
    assert "141.1 GB of it the model; --device spread lays its blocks over several GPUs, at least " in alone
    two = "\n".join(summarise(find_large(directory, "2x80", device="spread")))
    assert re.search(r"does not fit each of 2 GPUs of 80\.0 GB: 9\d\.\d GB \(", two)
    assert "; fewer or shorter windows need less, or more GPUs hold less each" in two


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.1e9, "2.1 GB"), (3e12, "3000.0 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert show_size(count) == text


def test_a_run_that_asks_for_much_work_is_told_in_its_unit(tiny_llama: Path, untimed: None) -> None:
    settings = tiny_settings(tiny_llama, workers="2")
    line = summarise(estimate(settings, COURSE, target=0.5))[-1]
    assert re.fullmatch(
        r"work: about [\d.]+ MFLOP, [\d.]+ MFLOP of it by the busiest worker; no time can be predicted, as .*", line
    )
