"""The lines of every phase: exact bytes for a tiny model, and bounds that the code itself keeps."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.statistics.walks
from tests.tiny import make_tiny_config, make_tiny_model, tiny_settings
from tests.tools.estimate.helpers import (
    DENSE,
    FLOW,
    LLAMA_70B,
    MATRIX,
    MEMBERS,
    MODEL,
    MOMENTS,
    PROGRAM,
    STATE,
    large_settings,
    sizes,
    write_config,
)
from tools.base.settings import TeamSettings
from tools.estimate.beside import list_phases_beside
from tools.estimate.block import Counts, build_empty, count_block
from tools.estimate.memory import list_phases
from tools.estimate.meter import Meter
from tools.estimate.phases import ASKED_FOR, IN_ORDER, Facts, cut_parts, find_busiest, measure_process
from tools.estimate.pruning import Held, count_layer
from tools.estimate.shape import measure_shape
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.models.streamed import measure_stream
from tools.statistics.collect import collect_statistics
from tools.statistics.extent import work_alone
from tools.statistics.shards import share_out
from tools.statistics.walk import Walk
from tools.statistics.walks import Walks

FORWARD, GRAPH, LOSS, READOUT = 11, 13, 17, 19
COUNTS = Counts(FORWARD, GRAPH, LOSS, READOUT, forward=0.0, backward=0.0, head=0.0)
PRUNED, LEVELS, CURVE = 23, 29, 31


def find_facts(settings: TeamSettings, device: str = "cpu") -> Facts:
    """Of a model, with numbers for what is counted that no other line has."""
    model, reading = build_empty(settings)
    shape = measure_shape(model, find_layers(model))
    return Facts(shape, COUNTS, Held(PRUNED, LEVELS, CURVE), measure_process(), reading, device)


def find_phases(settings: TeamSettings, device: str = "cpu") -> dict[str, tuple[list[int], list[int]]]:
    """Bytes of the lines of each phase of a process that works alone, or of the busiest worker."""
    facts = find_facts(settings, device)
    part = find_busiest(cut_parts(settings, int(settings.workers or 0)))
    return {phase.name: sizes(phase) for phase in list_phases(facts, settings, part, facts.shape.weights)}


def test_a_tiny_llama_on_the_cpu(tiny_llama: Path) -> None:
    always = [3 * STATE]  # 3 validation windows before the second block
    backward = [MODEL, GRAPH, READOUT, 2 * FLOW]
    evaluation = [MODEL, FORWARD, STATE, LOSS]
    assert find_phases(tiny_settings(tiny_llama)) == {
        "load": ([MODEL], []),
        "validate the dense model": (evaluation, [*always, 2 * 3 * STATE]),
        "profile, statistics": (
            [MODEL, FORWARD, 3 * MOMENTS],  # of 4 windows in as many shards: two sums on the way, and a leaf
            [*always, 4 * STATE],
        ),
        "profile, gradients": (backward, [*always, 2 * STATE, 2 * 2 * STATE]),  # more than a curve behind it
        ASKED_FOR: ([MODEL, 2 * FLOW, LEVELS, MATRIX], [*always, 2 * STATE, 2 * STATE]),
        "prune": ([MODEL, PRUNED, MATRIX], always),
        IN_ORDER: ([MODEL, MOMENTS, PRUNED, MATRIX], [*always, 4 * STATE]),
        "validate": (evaluation, [*always, 3 * 3 * STATE]),
        "export": ([MODEL], always),
    }


def test_a_tiny_llama_in_bf16_on_a_gpu(tiny_llama: Path) -> None:
    phases = find_phases(tiny_settings(tiny_llama, dtype="bf16", device="cuda"), "cuda")
    assert phases["load"] == ([MODEL // 2], [MODEL, MODEL // 2])  # the file is fp32
    assert phases["profile, statistics"][0] == [MODEL // 2, FORWARD, 3 * MOMENTS, 64 * 48 * 4]
    assert phases["profile, gradients"][0] == [
        *(MODEL // 2, 2 * FLOW // 2),
        64 * 80 * 4,  # inputs and output gradients of one layer and window in fp32
        CURVE,
    ]
    assert phases["export"] == ([MODEL // 2], [3 * STATE // 2, MODEL // 2])


def test_every_process_holds_the_program(tiny_llama: Path) -> None:
    settings = tiny_settings(tiny_llama, workers="2")
    facts, parts = find_facts(settings), cut_parts(settings, 2)
    assert facts.process > 50_000_000
    phases = [*list_phases(facts, settings, parts[0], MODEL), *list_phases_beside(facts, settings, parts)]
    assert [phase.host[0].what for phase in phases] == [PROGRAM] * len(phases)
    assert {phase.host[0].bytes for phase in phases} == {facts.process}


def test_formulas_are_what_they_come_to(tiny_llama: Path) -> None:
    settings = tiny_settings(tiny_llama, dtype="bf16")
    facts, (part,) = find_facts(settings), cut_parts(settings, 0)
    for phase in list_phases(facts, settings, part, facts.shape.weights):
        for line in [*phase.device, *phase.host]:
            if re.match(r"\d", line.how) and "²" not in line.how:
                factors = [float(part.split()[0].replace(",", "")) for part in line.how.split(" × ")]
                assert math.prod(factors) == line.bytes, line


def test_no_more_gradient_windows_than_there_are_windows(tiny_llama: Path) -> None:
    four, nine, three = (find_phases(tiny_settings(tiny_llama, gradient_windows=n)) for n in (4, 9, 3))
    assert four == nine != three


# --- workers -----------------------------------------------------------------------------------------------------


def test_two_workers_of_a_tiny_llama(tiny_llama: Path) -> None:
    """4 calibration windows (2 of them with gradients) in 4 shards, and 3 validation windows; both on one CPU."""
    settings = tiny_settings(tiny_llama, workers="2", worker_threads=1)
    kept = 2 * STATE  # 2 of the 3 validation windows before the second block
    evaluation = [MODEL, FORWARD, STATE, LOSS]
    backward = [MODEL, GRAPH, READOUT, 2 * FLOW]  # one window, of two blocks
    job = [2 * MEMBERS * 4, MATRIX]
    levels, packed = 5 * 4 * MEMBERS, DENSE + DENSE // 32
    assert find_phases(settings) == {
        "load": ([MODEL], []),
        "validate the dense model": (evaluation, [kept, 2 * 2 * STATE]),
        "profile, statistics": ([MODEL, FORWARD, 2 * MOMENTS], [kept, 2 * STATE]),
        "profile, gradients": (backward, [kept, STATE, 2 * STATE]),
        ASKED_FOR: ([*backward, LEVELS, MATRIX], [kept, STATE, STATE, *job, levels]),
        "prune": ([MODEL, PRUNED, MATRIX], [kept, *job]),
        IN_ORDER: ([MODEL, PRUNED, MATRIX], [kept, 2 * STATE, *job]),
        "validate": (evaluation, [kept, job[0], 3 * STATE, 2 * 2 * STATE]),
        "export": ([MODEL], [kept]),
    }
    given, results = [DENSE, 4 * MATRIX], MEMBERS * 33 // 8
    beside = list_phases_beside(find_facts(settings), settings, cut_parts(settings, 2))
    assert {phase.name: (*sizes(phase), [line.bytes for line in phase.store]) for phase in beside} == {
        "load": ([MODEL], [], []),
        "validate the dense model": ([MODEL], [2 * 3 * STATE], [3 * STATE]),
        "profile, statistics": ([MODEL], [2 * MOMENTS], [4 * MOMENTS]),
        "profile, gradients": ([MODEL], [], []),
        ASKED_FOR: ([MODEL, MATRIX], [], [*given, levels]),
        "prune": ([MODEL, MATRIX], [], [*given, results]),
        IN_ORDER: ([MODEL, MATRIX], [2 * MOMENTS], [*given, results, 4 * MOMENTS]),
        "validate": ([MODEL], [3 * STATE], [DENSE, packed, 3 * STATE]),
        "export": ([MODEL], [], [DENSE]),
    }


def test_a_worker_on_a_gpu_hands_over_by_way_of_the_cpu(tiny_llama: Path) -> None:
    phases = find_phases(tiny_settings(tiny_llama, device="cuda", workers="2"), "cuda")
    assert phases["profile, statistics"][1] == [2 * STATE, 2 * STATE, MOMENTS]
    assert phases["load"] == ([MODEL], [MODEL])


def test_a_part_of_a_model_on_each_gpu(tmp_path: Path) -> None:
    settings = large_settings(write_config(tmp_path / "70b", LLAMA_70B), device="spread")
    facts, (part,) = find_facts(settings, "cuda"), cut_parts(settings, 0)
    phases = {phase.name: phase for phase in list_phases(facts, settings, part, 1000)}
    assert {phase.device[0].bytes for phase in phases.values()} == {1000}
    assert [line.what for line in phases["load"].host] == [PROGRAM], "no weight passes through CPU memory"
    assert phases["profile, statistics"].device[2].bytes == 4 * 4 * (6 * 8192**2 + 28672**2)


# --- what it must agree with -----------------------------------------------------------------------------------


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
    empty = build_empty(settings)[0]
    held = count_layer([(x.weight_OI.shape[0], x.weight_OI.shape[1]) for x in layers], torch.float32)
    facts = find_facts(settings)._replace(counts=count_block(empty, 16), held=held)
    part = find_busiest(cut_parts(settings, workers))
    said = {phase.name: phase for phase in list_phases(facts, settings, part, facts.shape.weights)}

    def bound(name: str) -> int:
        beside = {"the model", PROGRAM}
        lines = [*said[name].device, *said[name].host]
        return sum(x.bytes for x in lines if x.what not in beside and not x.what.startswith("inputs of every few"))

    known = {x.name: (torch.empty(0), *(torch.ones(n) for n in reversed(x.weight_OI.shape))) for x in layers}
    up, down, walk = 0, 0, Walk(0, "run")
    for span in share_out(8, max(workers, 1)):
        walks = Walks(blocks, layers, ids_BT, 8, 0, tmp_path, ahead=int(workers > 0))
        meter: Any = Meter()
        with meter:
            for block in range(3):
                walks.moments(span, walk, block, True, "profile")
        up = max(up, meter.peak)
        meter = Meter()
        with meter:
            for block in (2, 1, 0):
                walks.gradients(span, walk, block)
                if workers and block > 0:  # the next one's are asked for before
                    walks.gradients(span, walk, block - 1)
                walks.mask_curves(span, walk, block, {x.name: known[x.name] for x in layers if x.block == block})
        down = max(down, meter.peak)
    assert 0.9 * bound("profile, statistics") < up <= bound("profile, statistics")
    assert 0.4 * bound("profile, gradients") < down <= bound("profile, gradients")
    if not workers:
        team, extent = work_alone(blocks, layers, ids_BT, 8, 0, tmp_path)
        meter = Meter()
        with meter:
            collect_statistics(team, extent, layers, lambda *_: None, lambda name, moment_II: None)
        own = sum(4 * (layer.weight_OI.shape[1] + 2 * layer.weight_OI.shape[0]) for layer in layers)  # what it is for
        assert meter.peak <= max(bound("profile, statistics"), bound("profile, gradients")) + own


def test_of_a_streamed_model_states_lie_on_disk_where_they_have_no_room(tiny_llama: Path) -> None:
    """4 calibration windows, and 3 of validation beside the dense model's; what flows back is held."""
    settings = tiny_settings(tiny_llama)
    sizes = measure_stream(build_empty(settings)[0])

    def find(room: int) -> dict[str, list[int]]:
        facts, (part,) = find_facts(settings)._replace(states=room), cut_parts(settings, 0)
        phases = list_phases(facts, settings, part, facts.shape.weights, streamed=sizes)
        return {phase.name: [line.bytes for line in phase.host[1:] if line.bytes] for phase in phases}

    held, less, none = find(4 * STATE), find(4 * STATE - 1), find(3 * STATE - 1)
    assert held["profile, statistics"] == held[IN_ORDER] == [4 * STATE]
    assert held["validate the dense model"] == held["validate"] == less["validate"] == [3 * STATE, 3 * STATE]
    assert less["profile, statistics"] == less[IN_ORDER] == []
    assert none["validate the dense model"] == none["validate"] == [3 * STATE]
    assert held["profile, gradients"] == none["profile, gradients"] == [2 * STATE, 2 * 2 * STATE]


def test_of_a_streamed_model_two_sums_are_held_while_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_tiny_config("llama")
    config.intermediate_size = 768
    model = type(make_tiny_model("llama"))(config).eval().requires_grad_(False)
    layers, blocks = find_layers(model), Blocks(model)
    ids_BT = torch.randint(0, 320, (8, 16), generator=torch.Generator().manual_seed(0))
    blocks.embed(ids_BT[0])  # looks at what blocks return
    sums = measure_shape(model, layers).moments

    def collect() -> tuple[Any, int]:
        meter: Any = Meter()
        with meter:
            ((_, found),), _ = Walks(blocks, layers, ids_BT, 2, 0, tmp_path).moments(
                (0, 8), Walk(0, "run"), 0, True, "profile"
            )
        return found, meter.peak

    held, most = collect()
    monkeypatch.setattr(tools.statistics.walks, "find_stream", lambda model: model)
    monkeypatch.setattr("tools.statistics.waiting.has_room", lambda size: False)
    waited, fewer = collect()
    assert 4 * sums < most and 2 * sums < fewer < 2.5 * sums
    assert held.keys() == waited.keys() and all(torch.equal(held[name], waited[name]) for name in held)
    assert list(tmp_path.iterdir()) == []
