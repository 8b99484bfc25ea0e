"""What is said of runs that take parts away, beside what such work holds, builds and writes."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benches import ignore, open_bench
from tests.cuts import order_cut
from tests.tiny import make_tiny_config, make_tiny_model, save_biased_model, tiny_settings
from tests.tools.estimate.helpers import MODEL, PROGRAM, QWEN3_8B, STATE, large_settings, sizes, write_config
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.base.settings import TeamSettings
from tools.estimate.block import build_empty
from tools.estimate.course import Course, CutCourse
from tools.estimate.cut_work import BUILDING, SPEED
from tools.estimate.cutting import BUILD, CHOOSE, CURVES, CUT, SEARCH, TIME, WANDA, find_cutting
from tools.estimate.meter import Meter
from tools.estimate.needs import Estimate, estimate
from tools.estimate.phases import Phase
from tools.estimate.room import read_devices
from tools.estimate.show import summarise
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.plans.cuts import Counts, find_most, list_by_blocks
from tools.plans.recipe import Recipe
from tools.surgery.blocks import drop_blocks
from tools.surgery.curves import Curves, measure_curves
from tools.surgery.parts import NEEDS_WHOLE, Cut, Fit, find_parts
from tools.surgery.rebuild import build_cut
from tools.surgery.share import find_shape, find_target, make_fits
from tools.workbench.bench import Workbench

UNIFORM = Recipe(method="wanda", refit=False, allocation="uniform")
PHASES = [CURVES, CHOOSE, SEARCH, CUT, "validate", WANDA, BUILD, "export"]


def plan(size: float, rounds: int = 2) -> Course:
    return Course([], baselines=[UNIFORM], profiles=0, tests=3, prompts=4, continuing=2, cut=CutCourse(rounds, size, 8))


def find(source: Path, size: float = 0.6, devices: str = "", **changes: Any) -> Estimate:
    known = read_devices(devices) if devices else None
    return estimate(tiny_settings(source, **changes), plan(size), target=0.45, devices=known)


def take(found: list[Phase], name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the lines of a phase, by what they are of: on the device, and in CPU memory."""
    (phase,) = [phase for phase in found if phase.name == name]
    return {x.what: x.bytes for x in phase.device}, {x.what: x.bytes for x in phase.host if x.what != PROGRAM}


# --- what goes ---------------------------------------------------------------------------------------------------


def test_what_goes_is_the_most_of_all_cuts_that_come_to_the_size(tiny_llama: Path) -> None:
    model, _ = build_empty(tiny_settings(tiny_llama))
    target = find_target(model, 0.6)
    every = list_by_blocks(target.shape, target.share)
    found = find_cutting(model, find_layers(model), CutCourse(1, 0.6, 8))
    assert found.most == find_most(every) == Counts(1, 40, 1)
    assert [(form.kind, form.most, form.least) for form in found.forms] == [("heads", 1, 1), ("neurons", 40, 8)]
    assert found.describe() == (
        "61.2% of the model's bytes stay; at most 40 of 48 neurons and 1 of 2 groups of heads of every block, and 1 of "
        "2 blocks, not all at once"
    )


def test_a_speed_may_come_to_any_cut(tiny_llama: Path, untimed: None) -> None:
    found = find(tiny_llama, size=0)
    assert found.goes == (
        "what a speed takes is measured then; at most 40 of 48 neurons and 1 of 2 groups of heads of every block, and "
        "1 of 2 blocks, not all at once"
    )
    assert [phase.name for phase in found.phases] == ["load", TIME, "validate the dense model", *PHASES]
    halved = 4 * 2 * (1 * 1536 + 24 * 96)  # of 2 blocks each lacks half of its heads, or of its neurons
    assert take(found.phases, TIME)[0]["smaller shapes"] == halved
    (exported,) = [line.bytes for line in found.disk if line.what == "the exported model"]
    assert exported == MODEL - 4 * 2 * 8 * 96, "as few neurons may go as can"


@pytest.mark.parametrize(("architecture", "size"), [("qwen3_moe", 0.8), ("llama", 0.001), ("gemma4", 0.8)])
def test_what_cannot_be_cut_is_refused_as_by_the_run(architecture: str, size: float, tmp_path: Path) -> None:
    with pytest.raises(UserError) as expected:
        find_target(make_tiny_model(architecture), size)
    directory = write_config(tmp_path / architecture, make_tiny_config(architecture).to_dict())
    with pytest.raises(UserError) as refused:
        find(directory, size)
    assert str(refused.value) == str(expected.value)


@pytest.mark.parametrize("device", ["stream", "spread"])
def test_a_speed_is_not_asked_of_a_model_that_is_not_on_one_device(
    device: str, tmp_path: Path, no_gpu: None, untimed: None
) -> None:
    directory = write_config(tmp_path / "qwen3-8b", QWEN3_8B)
    with pytest.raises(UserError, match=f"^target_speed {NEEDS_WHOLE}$"):
        estimate(large_settings(directory, device=device), plan(0), target=0.45, devices=read_devices("2x80"))


# --- what is held --------------------------------------------------------------------------------------------------


def test_a_tiny_llama_on_the_cpu(tiny_llama: Path, untimed: None) -> None:
    """4 calibration windows of 2 blocks: one of 2 groups of heads and 40 of 48 neurons go, or one block and fewer."""
    found = find(tiny_llama)
    assert [phase.name for phase in found.phases] == ["load", "validate the dense model", *PHASES]
    sums = 4 * (2 * 32**2 + 48**2 + 32**2)
    device, host = take(found.phases, CURVES)
    assert device["sums of one block's parts"] == sums
    assert device["of what parts give, one window"] == 4 * STATE
    assert device["what it reads in fp64"] == 2 * 64 * 48 * 8
    assert host == {"what one block reads and what it gives": 2 * 4 * STATE}
    device, host = take(found.phases, CHOOSE)
    assert device["sums of one block's parts"] == sums
    assert host == {"gradients passed on": 4 * STATE}
    device, host = take(found.phases, SEARCH)
    assert device["dense hidden states"] == 4 * STATE
    assert host == {"inputs of all blocks": 3 * 4 * STATE}
    device, host = take(found.phases, CUT)
    assert device["fitted output projections"] == 4 * 32 * (16 + 48 - 8), "of one block that stays"
    assert device["sums of one block's parts"] == 8 * (32**2 + 48 * (48 + 32)), "and of what is not passed on"
    assert host["inputs of one block, of both models"] == 2 * 4 * STATE
    own = 4 * (1536 + (48 - 8) * 96)
    for name in (BUILD, "export"):
        assert take(found.phases, name)[0]["the smaller model"] == own


def test_a_token_before_the_text_of_each_window_is_held_too(beginning_llama: Path, untimed: None) -> None:
    found = find(beginning_llama, calibration_windows=20)
    state = 65 * 32 * 4
    assert take(found.phases, SEARCH)[1] == {"inputs of all blocks": 16 * 3 * state}, "1,024 tokens of text"
    assert take(found.phases, CUT)[1]["inputs of one block, of both models"] == 2 * 20 * state
    assert found.disk[0].bytes == 3 * state


def test_a_large_model_on_a_gpu(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    settings = large_settings(write_config(tmp_path / "qwen3-8b", QWEN3_8B))
    found = estimate(settings, plan(0.8), target=0.45, devices=read_devices("80"))
    (exported,) = [line.bytes for line in found.disk if line.what == "the exported model"]
    whole, state = found.phases[0].device_bytes, 2048 * 4096 * 2
    assert 0.79 * whole < exported < 0.81 * whole
    device, host = take(found.phases, BUILD)
    assert device["the smaller model"] == host["the smaller model on its way"] == exported, "nothing is shared there"
    device, host = take(found.phases, SEARCH)
    assert device["inputs of all blocks, one window"] == host["inputs of all blocks"] / 2 == 37 * state
    (walked,) = [line.bytes for line in found.disk if line.what.endswith("while the parts are measured")]
    assert take(found.phases, CURVES)[1]["what one block reads and what it gives"] / 2 == 128 * state == walked / 39
    assert {work.seconds for work in found.work} == {None} and found.other_work == []
    assert any(line.startswith("fits one GPU of 80.0 GB: ") for line in summarise(found))
    short = estimate(settings, plan(0.8), target=0.45, devices=read_devices("20"))
    (verdict,) = [line for line in summarise(short) if line.startswith("does not fit one GPU of 20.0 GB: ")]
    assert verdict.endswith("; fewer or shorter windows need less, and --device stream")


def test_a_large_model_that_is_streamed(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    directory = write_config(tmp_path / "qwen3-8b", QWEN3_8B)
    settings = large_settings(directory, device="stream")
    found = estimate(settings, plan(0.8), target=0.45, devices=read_devices("12"))
    streamed, whole = found.phases[0].device_bytes, 2 * 8_190_735_360
    assert found.streamed and streamed < whole / 10
    device, host = take(found.phases, BUILD)
    assert device["of the smaller model"] == streamed and not any("on its way" in what for what in host)
    disk = {line.what: line.bytes for line in found.disk}
    assert disk["the model as it is now"] == whole
    assert disk["the smaller model, until it is exported"] == disk["the exported model"]
    [built] = [work for work in found.work if work.name == BUILD]
    assert built.passes == BUILDING and not any(work.name == SPEED for work in found.work)


def test_a_large_model_over_two_gpus(tmp_path: Path, no_gpu: None, untimed: None) -> None:
    settings = large_settings(write_config(tmp_path / "qwen3-8b", QWEN3_8B), device="spread")
    found = estimate(settings, plan(0.8), target=0.45, devices=read_devices("2x24"))
    part = max(line.bytes for line in found.spread)
    device, host = take(found.phases, BUILD)
    assert device["the smaller model"] == part == found.phases[0].device_bytes
    (exported,) = [line.bytes for line in found.disk if line.what == "the exported model"]
    assert part < exported == host["the smaller model on its way"]


def test_workers_wait_while_the_model_is_cut(tiny_llama: Path, untimed: None) -> None:
    found = find(tiny_llama, workers="2")
    assert [phase.name for phase in found.of_worker] == [phase.name for phase in found.phases]
    for phase in found.of_worker:
        assert (sizes(phase)[0] == [MODEL]) is (phase.name in {"load", CURVES, CHOOSE, SEARCH, CUT, BUILD, "export"})


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Any, TeamSettings]:
    """(a model of which the matrices of parts are most of what is held, settings of a run of it)."""
    config = make_tiny_config("llama", intermediate_size=256, num_hidden_layers=3)
    model = type(make_tiny_model("llama"))(config).eval().requires_grad_(False)
    windows = {"window": 32, "calibration_windows": 8, "gradient_windows": 2}
    return model, tiny_settings(write_config(tmp_path / "wide", config.to_dict()), **windows)


def count_peak(work: Callable[[], object]) -> int:
    meter = Meter()
    with meter:
        work()
    return meter.peak


def test_no_phase_holds_more_than_said(wide: tuple[Any, TeamSettings], untimed: None) -> None:
    model, settings = wide
    phases = {phase.name: phase for phase in estimate(settings, plan(0.7), target=0.45).phases}

    def said(name: str) -> int:
        """Without what was there before, and what validations left."""
        lines = [x for x in [*phases[name].device, *phases[name].host] if not x.what.startswith("inputs of every few")]
        return sum(x.bytes for x in lines if x.what not in {"the model", PROGRAM})

    ids_BT = torch.randint(0, 320, (8, 32), generator=torch.Generator().manual_seed(0))
    Blocks(model).embed(ids_BT[0])  # looks at what blocks return
    target = find_target(model, 0.7)
    every = list_by_blocks(target.shape, target.share)
    most, curves, dropped = find_most(every), list[Curves](), list[int]()

    walked = count_peak(lambda: curves.append(measure_curves(model, most, ids_BT, ignore_progress)))
    assert 0.9 * said(CHOOSE) < walked <= max(said(CHOOSE), said(CURVES))
    dropping = islice(drop_blocks(model, ids_BT, ignore_progress), most.blocks)
    searched = count_peak(lambda: dropped.extend(drop.block for drop in dropping))
    assert 0.7 * said(SEARCH) < searched <= said(SEARCH)

    def cut(counts: Counts) -> None:
        for fit in make_fits(model, counts, curves[0], dropped[: counts.blocks], ids_BT, ignore_progress):
            assert len(fit.units)

    fitted = [count_peak(lambda: cut(counts)) for listed in every for counts in listed]  # noqa: B023
    assert 0.9 * said(CUT) < max(fitted) <= said(CUT)


def test_a_smaller_model_shares_all_that_is_not_cut(wide: tuple[Any, TeamSettings], untimed: None) -> None:
    model, settings = wide
    found = estimate(settings, plan(0.7), target=0.45)
    (exported,) = [line.bytes for line in found.disk if line.what == "the exported model"]
    target, there = find_target(model, 0.7), {parameter.data_ptr() for parameter in model.parameters()}
    shared = []
    for listed in list_by_blocks(target.shape, target.share):
        for counts in listed:
            kinds = [kind for kind in ("heads", "neurons") if getattr(counts, kind)]
            parts = [p for kind in kinds for p in find_parts(model, kind) if p.block >= counts.blocks]  # type: ignore[arg-type]
            fits = [Fit(part, torch.arange(part.units - getattr(counts, part.kind))) for part in parts]
            built = build_cut(model, Cut(counts, fits, tuple(range(counts.blocks))))
            weights = list(built.parameters())
            assert 0.9 * exported < sum(p.nbytes for p in weights) <= exported
            shared.append(sum(p.nbytes for p in weights if p.data_ptr() not in there))
    assert take(found.phases, BUILD)[0]["the smaller model"] == max(shared)


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.fixture
def cut_bench(tmp_path: Path, workbench_closed: None) -> tuple[Workbench, Path]:
    """(a workbench with a model that has biases behind what is cut, where that model lies)."""
    source = save_biased_model(tmp_path / "model", "llama")
    return open_bench(tiny_settings(source), tmp_path / "run"), source


@pytest.mark.parametrize("blocks", [0, 1])
def test_no_more_is_written_than_said(cut_bench: tuple[Workbench, Path], blocks: int, untimed: None) -> None:
    bench, source = cut_bench
    lines = {line.what: line.bytes for line in find(source).disk}

    def count_written() -> int:
        files = [path for path in (bench.directory / "artifacts").rglob("*.safetensors") if path.is_file()]
        return sum(path.stat().st_size for path in files)

    profile = bench.profile_bare(ignore)
    hidden = lines["the dense model's hidden states"]
    means = sum(4 * sum(layer.weight_OI.shape) for layer in bench.layers)
    assert hidden <= count_written() <= hidden + 2 * means + 8192  # a file has a header of a few kilobytes at most
    order = order_cut(bench, profile, 0.6, blocks=blocks)
    before = count_written()
    units = lines["which units stay, and the order in which they go"] / 6
    assert before <= hidden + 2 * means + 8192 + units
    bench.prune(profile, order, ignore)
    written, cut = count_written() - before, lines["layers of checkpoints"] / 5
    assert 0.5 * cut * (blocks == 0) < written <= cut + units + 512


def test_a_run_begins_where_there_is_room_for_what_its_cut_writes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untimed: None
) -> None:
    settings = tiny_settings(tiny_llama)
    zeros, needed = estimate(settings, Course([Recipe()]), target=0.45), find(tiny_llama).disk_bytes
    room = shutil.disk_usage(tmp_path)

    def open_with(free: int, course: Course) -> Workbench:
        monkeypatch.setattr(shutil, "disk_usage", lambda _place: room._replace(free=free))
        directory = tmp_path / str(len([*tmp_path.iterdir()]))  # what is there already would be room
        directory.mkdir()
        return Workbench(settings, directory, pytest.fail, ignore, course=course)

    open_with(needed, plan(0.6))
    with pytest.raises(UserError, match=r"^the disk is full: "):
        open_with(needed - 1, plan(0.6))
    assert needed < zeros.other_disk
    with pytest.raises(UserError, match=r"^the disk is full: "):
        open_with(needed, Course([]))
    with pytest.raises(UserError, match=r"^target_size 0.001 cannot be met: "):
        open_with(needed, plan(0.001))


def test_a_shape_alone_says_the_same_as_the_model(tiny_llama: Path, tmp_path: Path, untimed: None) -> None:
    config = write_config(tmp_path / "shape", make_tiny_config("llama").to_dict()) / "config.json"
    shape, found = find_shape(make_tiny_model("llama")), find(config)
    assert shape.blocks == found.blocks
    assert found.disk == find(tiny_llama).disk and found.goes == find(tiny_llama).goes
