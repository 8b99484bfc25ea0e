"""What a run will need (memory, disk, time), said before anything is loaded: the model is built without its weights.

Memory and disk are sums of lines. What blocks, output head and methods hold while they work is counted, by running them
on shapes alone; what they take is timed, by really running one block of each kind with random weights on the device,
where that is here. Where workers share the work, each of them has phases of its own, beside those of the process that
they work for.
"""

import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field

from tools.base.errors import ImpossiblePlan, UserError, in_one_line
from tools.base.settings import TeamSettings, count_threads
from tools.estimate.beside import list_phases_beside
from tools.estimate.block import Counts, build_empty, count_block, read_lead, read_source
from tools.estimate.course import Course, name_recipe
from tools.estimate.cut_work import list_cut_end, list_cut_work, price_cut_flops, price_cut_seconds
from tools.estimate.cutting import Cutting, find_cutting, list_cut_phases
from tools.estimate.memory import list_phases
from tools.estimate.phases import Facts, Part, Phase, cut_parts, find_busiest, measure_process
from tools.estimate.polish import Polish, add_polish, add_shared_polish, list_polish_disk, place_polish
from tools.estimate.prices import Prices, Pricing, Work, price_flops, price_seconds
from tools.estimate.pruning import count_layer
from tools.estimate.room import Devices, explain_absence, find_devices, find_room, lay_out
from tools.estimate.shape import measure_shape
from tools.estimate.timing import time_run
from tools.estimate.work import find_shares, list_work
from tools.models.disk import DiskPlan, Line, plan_disk
from tools.models.layers import Layer, Reach, find_blocks, find_layers, measure_reach, refuse_small_reach
from tools.models.load import FITS, count_models
from tools.models.positions import refuse_long_windows
from tools.models.streamed import StreamSizes, measure_stream
from tools.plans.methods import LEVERS
from tools.plans.polish import Schedule, schedule_polish
from tools.statistics.shards import count_waiting
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
        """CPU memory of a phase of this process and, were they on the same machine, of all workers and their store."""
        mates = [other for other in self.of_worker if other.name == phase.name]
        parts = [phase, *(mate for mate in mates for _ in range(self.workers))]
        return phase.store_bytes + sum(p.bytes if self.device == "cpu" else p.host_bytes for p in parts)

    @property
    def needed(self) -> tuple[int, str]:
        """(most that one device must hold, in which phase): a GPU's process, or all processes where it is the CPU.

        Where there are workers, the first one's GPU is also that of the process that they work for.
        """
        if self.device == "cpu":
            return max((self.count_host(phase), phase.name) for phase in self.phases)
        mates = {phase.name: phase.device_bytes for phase in self.of_worker}
        return max((phase.device_bytes + mates.get(phase.name, 0), phase.name) for phase in self.phases)


def estimate(
    settings: TeamSettings,
    course: Course,
    *,
    target: float,
    devices: Devices | None = None,
    directory: Path = Path(),
) -> Estimate:
    """What a run needs that prunes to `target`, unless it takes parts away, and takes this `course`.

    `devices` are those of another machine, whose disk has room for all unless the settings say how much; without them,
    those that are here, and the disk is that of the `directory`. Reads the model's config, and runs one block of each
    kind for some seconds where the device is here. Raises UserError in one line.
    """
    run = _read_run(settings)
    model, layers, workers = run.model, run.layers, run.workers
    place = _find_place(settings, model, devices)
    if (place.streamed or place.spread) and course.cut and not course.cut.size:
        raise UserError(f"target_speed {NEEDS_WHOLE}")
    cutting = find_cutting(model, layers, course.cut) if course.cut else None
    counts = count_block(model, settings.window, run.lead)
    threads = count_threads(settings) if workers else torch.get_num_threads()
    seconds, tokens, untimed = _time(model, run.read, course, cutting, place.device, threads)
    facts = _gather_facts(run, place, counts, course, cutting)
    room = settings.disk * 1e9 or (math.inf if place.told else _count_free_disk(directory))
    in_source = read_source(settings, layers) if place.streamed else set[str]()
    disk = _plan_both_ways(run, place, course, cutting, room, in_source)
    phases = _list_all_phases(run, place, facts, course, cutting, anew=disk.plan.at_once is not None)
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

    polished = phases.polish_disk
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
        disk=[*disk.plan.lines, *polished],
        room=room if math.isfinite(room) else None,
        at_once=disk.plan.at_once,
        work=work(disk.plan.at_once),
        other_disk=disk.other.bytes + sum(line.bytes for line in polished),
        other_work=[] if cutting else work(disk.other.at_once),
        untimed=untimed,
        tokens=tokens,
    )


class _Run(NamedTuple):
    """A run as its settings and its model's config have it."""

    settings: TeamSettings
    read: TeamSettings
    """The same, with windows as layers read them: each behind what stands before its text."""
    model: Any
    """Without weights."""
    reading: int
    """Bytes that are held while its weights are read."""
    layers: list[Layer]
    lead: int
    reach: Reach
    workers: int
    parts: list[Part]
    """What each of them does, or the one process without any."""

    @property
    def weights(self) -> int:
        """Of the prunable layers."""
        return sum(layer.weight_OI.numel() for layer in self.layers)


class _Place(NamedTuple):
    """Where the work is done."""

    device: str
    devices: Devices | None
    told: bool
    """Whether it is another machine, which was told of."""
    streamed: StreamSizes | None
    """None where the model is held."""
    spread: list[Line]


class _BothWays(NamedTuple):
    """What is written, with second moments as there is room, and the other way."""

    plan: DiskPlan
    other: DiskPlan


class _Phases(NamedTuple):
    """Of this process, or of the one that workers work for, and of a worker."""

    own: list[Phase]
    of_worker: list[Phase]
    polish_disk: list[Line]


def _read_run(settings: TeamSettings) -> _Run:
    """Raises UserError where the model cannot be built, reads no such windows, or too little of it can be pruned, and
    for workers of a cluster."""
    workers = _count_workers(settings)
    model, reading = build_empty(settings)
    lead = read_lead(settings)
    refuse_long_windows(model, settings.window, lead)
    layers = find_layers(model)
    reach = measure_reach(model, layers)
    refuse_small_reach(reach, partial=settings.partial)
    read = settings.model_copy(update={"window": lead + settings.window})
    return _Run(settings, read, model, reading, layers, lead, reach, workers, cut_parts(settings, workers))


def _find_place(settings: TeamSettings, model: Any, devices: Devices | None) -> _Place:
    """On what the run is done, of the devices told of or else of those that are here. Raises UserError."""
    here = torch.cuda.is_available()
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not here)
    device = "cpu" if on_cpu or (settings.device == "stream" and not here and devices is None) else "cuda"
    told, devices = devices is not None, devices or find_devices(device)
    spread = lay_out(model, devices) if settings.device == "spread" else []
    whole = sum(parameter.nbytes for parameter in model.parameters())
    fits = devices is None or count_models(settings, device) * whole <= FITS * devices.bytes
    streams = settings.device == "stream" or (settings.device == "auto" and not fits)
    return _Place(device, devices, told, measure_stream(model) if streams else None, spread)


def _gather_facts(run: _Run, place: _Place, counts: Counts, course: Course, cutting: Cutting | None) -> Facts:
    forms = [(layer.weight_OI.shape[0], layer.weight_OI.shape[1]) for layer in run.layers]
    methods = {*([] if cutting else LEVERS), *(recipe.method for recipe, _ in course.pruned)}
    held = count_layer(forms, run.layers[0].weight_OI.dtype, methods)
    shape = measure_shape(run.model, run.layers, counts.routed)
    return Facts(shape, counts, held, measure_process(), run.reading, place.device)


def _plan_both_ways(
    run: _Run, place: _Place, course: Course, cutting: Cutting | None, room: float, in_source: set[str]
) -> _BothWays:
    """Without any room second moments are of one block at a time, with any amount all are kept."""
    waiting = count_waiting(run.settings.count_all("calibration"))

    def plan(room: float) -> DiskPlan:
        return plan_disk(
            *(run.model, run.layers, run.settings, room, run.lead),
            weighs=course.weighs,
            streamed=place.streamed is not None,
            in_source=in_source,
            waiting=waiting,
            checkpoints=course.checkpoints,
            sizes=cutting.sizes if cutting else None,
        )

    chosen = plan(room)
    return _BothWays(chosen, plan(0 if chosen.at_once is None else math.inf))


def _list_all_phases(
    run: _Run, place: _Place, facts: Facts, course: Course, cutting: Cutting | None, *, anew: bool
) -> _Phases:
    """The phases with those of a polish, or of a cut. Raises UserError where a polish cannot be."""
    read, workers, parts, streamed, weighs = run.read, run.workers, run.parts, place.streamed, course.weighs
    part = max((line.bytes for line in place.spread), default=facts.shape.weights)
    phases = list_phases(facts, read, find_busiest(parts), part, weighs=weighs, streamed=streamed, anew=anew)
    beside = list_phases_beside(facts, read, parts, weighs=weighs, streamed=streamed, anew=anew) if workers else []
    schedule = _schedule_polish(run.settings, course)
    survivors = course.count_survivors(run.weights)
    room = find_room(place.device, place.devices, here=not place.told)
    processes = [beside or phases, *[phases] * workers]
    polish = place_polish(schedule, survivors, read.window, facts, processes, room) if schedule else None
    if polish and workers:
        beside, phases = add_shared_polish(beside, phases, facts, polish, workers)
    elif polish:
        phases = add_polish(phases, facts, polish)
    if cutting:
        cut = partial(list_cut_phases, facts=facts, settings=read, cutting=cutting, streamed=streamed, lead=run.lead)
        cut = partial(cut, part=part if place.spread else None)
        beside, phases = cut(beside) if workers else [], cut(phases, works=not workers)
    return _Phases(beside or phases, phases if workers else [], _list_polish_disk(facts, polish) if polish else [])


def _list_polish_disk(facts: Facts, polish: Polish) -> list[Line]:
    windows, shape = len(polish.schedule.windows), facts.shape
    return list_polish_disk(polish.survivors, polish.place.means, windows, polish.window, shape.hidden, shape.item)


def _count_free_disk(directory: Path) -> int:
    """Bytes, where a directory is or will be."""
    present = next(path for path in [directory.resolve(), *directory.resolve().parents] if path.exists())
    return shutil.disk_usage(present).free


def _schedule_polish(settings: TeamSettings, course: Course) -> Schedule | None:
    """The longest polish of a course; None where there is none. Raises UserError where the text is too short for it."""
    if not course.polishes:
        return None
    try:
        windows = course.count_fitted(settings)
        return schedule_polish(windows, settings.window, max(course.polishes), settings.seed)
    except ImpossiblePlan as error:
        raise UserError(str(error)) from error


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


def _count_workers(settings: TeamSettings) -> int:
    """0 where there are none. Raises UserError for those of a cluster, which is not asked."""
    if settings.workers and not settings.workers.isdigit():
        raise UserError(
            f"how many workers {settings.workers} has is not asked here; give their number, such as --workers 8"
        )
    return int(settings.workers or 0)
