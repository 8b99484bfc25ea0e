"""What a run will need (memory, disk, time), said before anything is loaded: the model is built without its weights.

Memory and disk are sums of lines. What blocks, output head and methods hold while they work is counted, by running them
on shapes alone; what they take is timed, by really running one block of each kind with random weights on the device,
where that is here. Where workers share the work, each of them has phases of its own, beside those of the process that
they work for.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field

from tools.base.errors import UserError, in_one_line
from tools.base.settings import TeamSettings, count_threads
from tools.estimate.block import count_block, list_conversion
from tools.estimate.course import Course, name_recipe
from tools.estimate.cut_work import list_cut_end, list_cut_work, price_cut_flops, price_cut_seconds
from tools.estimate.cutting import Cutting, find_cutting
from tools.estimate.phases import Phase, count_host, find_busiest, find_needed
from tools.estimate.places import count_free_disk, find_place, gather_facts, read_run, settle
from tools.estimate.prices import Prices, Pricing, Work, price_flops, price_seconds
from tools.estimate.room import Devices, explain_absence
from tools.estimate.timing import time_run
from tools.estimate.work import find_shares, list_work
from tools.models.disk import Line
from tools.models.layers import find_blocks
from tools.plans.layer_profile import LayerProfile
from tools.statistics.table import list_shapes
from tools.surgery.parts import NEEDS_WHOLE


class Estimate(BaseModel):
    """What a run will need, at most."""

    model: str
    dtype: str
    device: str = Field(description="cpu or cuda.")
    parameters: int
    blocks: int
    layers: int = Field(description="Prunable layers.")
    weights: int = Field(description="Their weights.")
    zeros: int = Field(description="How many of these are to be zero at the end.")
    goes: str = Field("", description="What of parts goes, at most, in words; empty where zeros are set instead.")
    of_blocks: float = Field(description="Share of the weights in the blocks that is prunable.")
    of_model: float = Field(description="Share of all weights that is prunable.")
    dense: list[str] = Field(description="Weights inside the blocks that stay dense, such as routers.")
    phases: list[Phase] = Field(description="Of this process; with workers, of the one that they work for.")
    workers: int = Field(0, description="0: this process does the work.")
    threads: int = Field(description="CPU threads of each process that does the work.")
    of_worker: list[Phase] = Field([], description="Of each worker, as `phases`, at most; empty without any.")
    devices: Devices | None = Field(None, description="Null where it is not known what there is.")
    spread: list[Line] = Field([], description="What each GPU holds of a model that is laid over them; empty if not.")
    streamed: int = Field(0, description="Bytes of all blocks where one at a time comes from disk; 0 where none does.")
    disk: list[Line]
    room: float | None = Field(None, description="Bytes on disk that there are; null where it is not known.")
    at_once: int | None = Field(
        None, description="Of how many blocks second moments lie on disk at once; null where they are kept."
    )
    work: list[Work]
    other_disk: int = Field(0, description="Bytes on disk were second moments kept, or not, the other way.")
    other_work: list[Work] = Field([], description="The steps the other way.")
    untimed: str = Field("", description="Why no step has seconds; empty where they have.")
    tokens: int = Field(0, description="Of the longest window that one block was really run on; 0 without any.")

    @property
    def peak(self) -> Phase:
        """The phase that holds most in both together."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def disk_bytes(self) -> int:
        """Sum of what is written."""
        return sum(line.bytes for line in self.disk)

    def seconds(self, work: Work) -> float | None:
        """Of one time, of the busiest worker; None where nothing was timed."""
        return None if work.seconds is None else work.share * work.seconds

    def count_host(self, phase: Phase) -> int:
        """As `phases.count_host`."""
        return count_host(phase, self.of_worker, self.device, self.workers)

    @property
    def needed(self) -> tuple[int, str]:
        """As `phases.find_needed`."""
        return find_needed(self.phases, self.of_worker, self.device, self.workers)


def estimate(
    settings: TeamSettings,
    course: Course,
    *,
    target: float,
    devices: Devices | None = None,
    directory: Path = Path(),
    refuse: Callable[[list[LayerProfile]], None] = lambda layers: None,
) -> Estimate:
    """What a run needs that prunes to `target`, unless it takes parts away, and takes this `course`.

    `devices` are those of another machine, whose disk has room for all unless the settings say how much; without them,
    those that are here, and the disk is that of the `directory`. Reads the model's config, and runs one block of each
    kind for some seconds where the device is here. `refuse` is told of the layers, of which sizes alone are known, and
    raises UserError where the target cannot be met. Raises UserError in one line.
    """
    run = read_run(settings)
    if not course.cut:
        refuse(list_shapes(run.layers))
    model, layers, workers = run.model, run.layers, run.workers
    place = find_place(settings, model, devices)
    if (place.streamed or place.spread) and course.cut and not course.cut.size:
        raise UserError(f"target_speed {NEEDS_WHOLE}")
    cutting = find_cutting(model, layers, course.cut) if course.cut else None
    counts = count_block(model, settings.window, run.lead)
    threads = count_threads(settings) if workers else torch.get_num_threads()
    seconds, tokens, untimed = _time(model, run.read, course, cutting, place.device, threads)
    facts = gather_facts(run, place, counts, course, cutting)
    room = settings.disk * 1e9 or (math.inf if place.told else count_free_disk(directory))
    place, disk, phases = settle(run, place, facts, course, cutting, room)
    shares = find_shares(settings, layers, find_busiest(run.parts))
    flops = price_flops(run.read, layers, counts, course)
    if cutting:
        flops = {**flops, **price_cut_flops(run.read, counts, cutting)}
    pricing = Pricing(flops, None if seconds is None else _crowd(seconds, place.device, workers * threads))
    blocks = len(find_blocks(model))

    def work(at_once: int | None) -> list[Work]:
        out = 0.0 if at_once is None else (math.ceil(blocks / at_once) + 1) / 2  # to the last block, and less and less
        cut = list_cut_work(settings, cutting, pricing) if cutting else []
        streams = place.streamed is not None
        steps = list_work(settings, len(layers), shares, course, pricing, streamed=streams, setting_out=out, cut=cut)
        return [*steps, *(list_cut_end(pricing, streamed=streams) if cutting else [])]

    beside = [*phases.polish_disk, *(list_conversion(settings, model) if place.streamed else [])]
    return Estimate(
        model=settings.model,
        dtype=settings.dtype,
        device=place.device,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=blocks,
        layers=len(layers),
        weights=run.weights,
        zeros=0 if cutting else round(target * run.weights),
        goes=cutting.describe() if cutting else "",
        of_blocks=run.reach.of_blocks,
        of_model=run.reach.of_model,
        dense=run.reach.dense,
        phases=phases.own,
        workers=workers,
        threads=threads,
        of_worker=phases.of_worker,
        devices=place.devices,
        spread=place.spread,
        streamed=place.streamed.blocks if place.streamed else 0,
        disk=[*disk.plan.lines, *beside],
        room=room if math.isfinite(room) else None,
        at_once=disk.plan.at_once,
        work=work(disk.plan.at_once),
        other_disk=disk.other.bytes + sum(line.bytes for line in beside),
        other_work=[] if cutting else work(disk.other.at_once),
        untimed=untimed,
        tokens=tokens,
    )


def _time(
    model: Any, settings: TeamSettings, course: Course, cutting: Cutting | None, device: str, threads: int
) -> tuple[Prices | None, int, str]:
    """(seconds on so many threads of a CPU, tokens of the longest window that was run, why there are none)."""
    if absence := explain_absence(model, device):
        return None, 0, absence
    prune = {name_recipe(recipe): recipe for recipe, _ in course.pruned}
    cut = {name_recipe(recipe): recipe for recipe in course.curves}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        place = torch.device(device)
        times = time_run(model, settings.window, place, course.prompts, prune, cut)
        more = price_cut_seconds(model, settings.window, place, cutting) if cutting else {}
        return {**price_seconds(times), **more}, times.tokens, ""
    except Exception as error:  # there may be too little memory, or no code for an operation
        return None, 0, f"one block could not be run here: {in_one_line(error, 100)}"
    finally:
        torch.set_num_threads(before)


def _crowd(prices: Prices, device: str, threads: int) -> Prices:
    """What one process takes while all workers have work: more, where they have more threads than there are cores."""
    times = 1.0 if device == "cuda" else max(1.0, threads / (os.cpu_count() or 1))
    return {thing: times * seconds for thing, seconds in prices.items()}
