"""What was estimated, for people: every line of the arithmetic, then what it comes to, in a few lines."""

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.base.words import show_flops, show_seconds, show_size
from tools.estimate.cutting import TIME
from tools.estimate.needs import Estimate
from tools.estimate.phases import Phase
from tools.estimate.prices import Work
from tools.models.disk import Line

DISK_RATE = 10**9
"""Bytes a second: what streamed weights are said to take by, for a disk of a rate that each knows of his own."""

GPU_RATE = 10**14
"""Floating-point operations a second, likewise, of a GPU that is not here."""


def print_estimate(found: Estimate, console: Console) -> None:
    """Every line of the arithmetic, then what it comes to; plain lines where there is no terminal."""
    if found.spread:
        own = [(line.what, line.how, show_size(line.bytes)) for line in found.spread]
        _print_table(console, f"the model over {len(own)} GPUs", own)
    for title, rows in _list_memory(found, found.phases, "this process, " if found.workers else ""):
        _print_table(console, title, rows)
    if found.workers:
        for title, rows in _list_memory(found, found.of_worker, "each worker, "):
            _print_table(console, title, rows)
    disk = [(line.what, line.how, show_size(line.bytes)) for line in found.disk]
    _print_table(console, f"disk: {show_size(found.disk_bytes)}", disk)
    work = [
        (
            *(step.name, step.how),
            *(f"{step.times} ×" if step.times else "", show_flops(step.flops) if step.flops else ""),
            *([f"{step.share:.3g} of it by the busiest worker"] if found.workers else []),
            _time_of(found, step),
        )
        for step in found.work
    ]
    _print_table(console, "work, one time each", work)
    console.print()
    for text in summarise(found):
        console.print(Text(text), soft_wrap=True)


def _list_memory(found: Estimate, phases: Sequence[Phase], whose: str) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows) of each phase; what all of them hold once the model is loaded comes first, and only once."""

    def place(phase: Phase) -> list[tuple[str, Line]]:
        gpu, cpu = ("", "") if found.device == "cpu" else ("GPU", "CPU")
        own = [*((gpu, line) for line in phase.device), *((cpu, line) for line in phase.host)]
        return own + [("object store", line) for line in phase.store]

    def show(lines: list[tuple[str, Line]]) -> list[tuple[str, ...]]:
        return [(line.what, line.how, where, show_size(line.bytes)) for where, line in lines]

    load, *others = phases
    common = [item for item in place(others[0]) if all(item in place(phase) for phase in others)]
    yield f"{whose}memory, in all phases but load", show(common)
    for phase in phases:
        size = show_size(phase.bytes)
        if found.device == "cuda":
            which = "one" if found.spread else "the"
            size = f"{show_size(phase.device_bytes)} on {which} GPU, {show_size(phase.host_bytes)} in CPU memory"
        if phase.store:
            size += f", {show_size(phase.store_bytes)} in the object store"
        lines = place(phase)
        named = show(lines if phase is load else [item for item in lines if item not in common])
        yield f"{whose}{phase.name}: {size}", named


def summarise(found: Estimate) -> list[str]:
    """What is to be pruned, the peaks, and whether there is room for them, in a few lines."""
    end = found.goes or f"{found.zeros:,} zeros at the end"
    lines = [
        f"{found.model}, {found.dtype} on {found.device}: {found.parameters:,} parameters, {found.blocks} blocks",
        f"prunable: {found.layers} layers, {found.weights:,} weights; {end}",
    ]
    if found.dense:
        share = f"{1 - found.of_blocks:.2%} of the weights in the blocks"
        lines.append(f"stay dense: {share}, such as {found.dense[0]}, no plain linear layers")
    if found.streamed:
        passes = _count_passes(found, found.work)
        size, whose = passes * found.streamed, f" for {found.workers} workers and this process" if found.workers else ""
        lines.append(
            f"streamed: one block of the model at a time comes from disk, all of them about {passes} times{whose}: "
            f"{show_size(size)}, {show_seconds(size / DISK_RATE)} at {show_size(DISK_RATE)} a second, and less by what "
            "the kernel keeps"
        )
    lines += _list_peaks(found)
    short = f", where {show_size(found.room)} are" if found.room is not None and found.room < found.disk_bytes else ""
    lines.append(f"disk: {show_size(found.disk_bytes)}{short}")
    return [*lines, *_compare_ways(found), _sum_up_work(found)]


def _compare_ways(found: Estimate) -> list[str]:
    """Second moments on disk, or collected anew whenever layers are pruned: which it is, and what the other costs.

    Nothing where that is no work, as for masks alone.
    """
    kept = found.at_once is None
    anew, stored = (found.other_work, found.work) if kept else (found.work, found.other_work)
    more = _count_work(found, anew) - _count_work(found, stored)
    if more <= 0:
        return []
    cost = show_flops(more) if found.untimed else show_seconds(more)
    if found.streamed:
        passes = _count_passes(found, anew) - _count_passes(found, stored)
        cost += f" and {show_size(passes * found.streamed)} of reading"
    other = show_size(found.other_disk)
    if kept:
        return [f"second moments: kept; with {other} of disk they are collected anew by every round, for {cost} more"]
    blocks = f"of {found.at_once:,} {'block' if found.at_once == 1 else 'blocks'} at a time"
    return [f"second moments: collected anew by every round, {blocks}; {other} of disk would save {cost}"]


def _count_passes(found: Estimate, steps: Sequence[Work]) -> int:
    """How often all blocks of a streamed model come from disk: by each worker where a step is shared."""
    return sum(step.times * step.passes * (found.workers if step.share < 1 else 1) for step in steps)


def _count_work(found: Estimate, steps: Sequence[Work]) -> float:
    """Seconds of all steps of the busiest worker, or operations where there are none."""
    if found.untimed:
        return sum(step.times * step.flops * step.share for step in steps)
    return sum(step.times * (found.seconds(step) or 0.0) for step in steps)


def _sum_up_work(found: Estimate) -> str:
    total, own = sum(work.times * work.flops for work in found.work), _count_work(found, found.work)
    if found.untimed:
        share = f", {show_flops(own)} of it by the busiest worker" if found.workers else ""
        rate = f", {show_seconds(own / GPU_RATE)} at {show_flops(GPU_RATE)} a second" if found.device == "cuda" else ""
        return f"work: about {show_flops(total)}{share}{rate}; no time can be predicted, as {found.untimed}"
    whose = f" by the busiest of {found.workers} workers" if found.workers else ""
    took = f"without loading the model, as one block took here on {found.tokens} tokens"
    return f"work: about {show_flops(total)}, {show_seconds(own)}{whose} {took}"


def _list_peaks(found: Estimate) -> list[str]:
    if found.workers:
        lines = _list_peaks_of(found.of_worker, found.device, f"each of {found.workers} workers: ")
        lines += _list_peaks_of(found.phases, found.device, "this process: ")
        store = max(found.phases, key=lambda phase: phase.store_bytes)
        lines.append(f"peak of Ray's object store: {show_size(store.store_bytes)} ({store.name})")
        most = max(found.phases, key=found.count_host)
        kind = "memory" if found.device == "cpu" else "memory of the CPU"
        lines.append(f"peak {kind} of a machine with all of them: {show_size(found.count_host(most))} ({most.name})")
    else:
        lines = _list_peaks_of(found.phases, found.device, "", "each" if found.spread else "the")
    return [*lines, _judge_room(found)]


def _list_peaks_of(phases: Sequence[Phase], device: str, whose: str, which: str = "the") -> list[str]:
    if device == "cpu":
        most = max(phases, key=lambda phase: phase.bytes)
        return [f"{whose}peak memory: {show_size(most.bytes)} ({most.name})"]
    on_device = max(phases, key=lambda phase: phase.device_bytes)
    on_host = max(phases, key=lambda phase: phase.host_bytes)
    return [
        f"{whose}peak memory of {which} GPU: {show_size(on_device.device_bytes)} ({on_device.name})",
        f"{whose}peak memory of the CPU: {show_size(on_host.host_bytes)} ({on_host.name})",
    ]


def _judge_room(found: Estimate) -> str:
    """Whether it all fits, and what to do if not."""
    needed, phase = found.needed
    if found.devices is None:
        return "whether that fits: torch sees no GPU here; say what there is with --device-memory, such as 80 or 8x80"
    room, count = found.devices.bytes, found.devices.count
    several = f"each of {count} GPUs" if len(found.spread) > 1 else "one GPU"
    place = "this memory" if found.device == "cpu" else several
    beside = ", with this process and a worker on the first" if found.workers and found.device == "cuda" else ""
    short = f"{found.workers} workers need as many GPUs, but there are {count}; " if _lacks_devices(found) else ""
    if needed <= room:
        return f"{short}fits {place} of {show_size(room)}: {show_size(needed)} at most ({phase}{beside})"
    verdict = f"{short}does not fit {place} of {show_size(room)}: {show_size(needed)} ({phase}{beside})"
    if found.goes:
        aim = "" if found.streamed or TIME in [phase.name for phase in found.phases] else ", and --device stream"
        return f"{verdict}; fewer or shorter windows need less{aim}"
    if found.device == "cpu":
        return f"{verdict}; {_advise_on_cpu(found)}"
    if found.spread:
        return f"{verdict}; fewer or shorter windows need less, or more GPUs hold less each"
    weights = found.phases[0].device_bytes
    working = needed - weights * (2 if found.workers else 1)
    fewer = "" if weights + working > room and weights >= room else "fewer or shorter windows need less; "
    least = f", at least {math.ceil(weights / (room - working))} of these" if working < room else ""
    alone = " without --workers" if found.workers else ""
    if found.streamed:
        return f"{verdict}; fewer or shorter windows need less"
    advice = f"{fewer}--device spread{alone} lays its blocks over several GPUs{least}, stream holds one at a time"
    return f"{verdict}, {show_size(weights)} of it the model; {advice}"


def _advise_on_cpu(found: Estimate) -> str:
    less = "fewer --workers need less" if found.workers else "fewer or shorter windows need less"
    return f"{less}{'' if found.streamed else ', and --device stream'}"


def _lacks_devices(found: Estimate) -> bool:
    return found.devices is not None and found.device == "cuda" and found.workers > found.devices.count


def _print_table(console: Console, title: str, rows: Sequence[tuple[str, ...]]) -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
    if not rows:
        return
    if not console.is_terminal:
        for row in rows:
            console.print(Text(f"  {'; '.join(cell for cell in row if cell)}"), soft_wrap=True)
        return
    table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
    for i in range(len(rows[0])):
        table.add_column(justify="left" if i < 2 else "right", no_wrap=i >= 2)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _time_of(found: Estimate, work: Work) -> str:
    seconds = found.seconds(work)
    return "" if seconds is None else show_seconds(seconds)
