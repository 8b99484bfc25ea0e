"""Where a run is done and what it holds there: on the devices that there are, the model held whole, spread or streamed.

The model is built without its weights, by its config.
"""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.base.errors import ImpossiblePlan, UserError
from tools.base.memory import count_free, count_room
from tools.base.settings import TeamSettings
from tools.estimate.beside import list_phases_beside
from tools.estimate.block import Counts, build_empty, count_block, read_lead, read_source
from tools.estimate.course import Course
from tools.estimate.cutting import Cutting, find_cutting, list_cut_phases
from tools.estimate.memory import list_phases
from tools.estimate.phases import Facts, Part, Phase, cut_parts, find_busiest, find_needed, measure_process
from tools.estimate.polish import (
    Polish,
    add_polish,
    add_shared_polish,
    count_polish_disk,
    list_polish_disk,
    place_polish,
)
from tools.estimate.pruning import count_layer
from tools.estimate.room import Devices, find_devices, find_room, lay_out
from tools.estimate.shape import measure_shape
from tools.models.disk import DiskPlan, Line, plan_disk
from tools.models.layers import Layer, Reach, find_layers, measure_reach, refuse_small_reach
from tools.models.load import FITS, choose_device, count_models, fits, is_settled, pick_device
from tools.models.positions import refuse_long_windows
from tools.models.streamed import StreamSizes, measure_stream
from tools.plans.methods import LEVERS
from tools.plans.polish import Schedule, schedule_polish
from tools.statistics.shards import count_waiting

HELD = 0.95
"""Share of the memory that there is which the fullest phase of a run may come to for `auto` to hold the model:
allocators lose a little, and the lines of `--dry-run` are tensors."""


class Run(NamedTuple):
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


class Place(NamedTuple):
    """Where the work is done."""

    device: str
    devices: Devices | None
    told: bool
    """Whether it is another machine, which was told of."""
    streamed: StreamSizes | None
    """None where the model is held."""
    spread: list[Line]


class BothWays(NamedTuple):
    """What is written, with second moments as there is room, and the other way."""

    plan: DiskPlan
    other: DiskPlan


class Phases(NamedTuple):
    """Of this process, or of the one that workers work for, and of a worker."""

    own: list[Phase]
    of_worker: list[Phase]
    polish_disk: list[Line]


def read_run(settings: TeamSettings, lead: int | None = None) -> Run:
    """With so many tokens before a window's text, or as many as the tokenizer has. Raises UserError where the model
    cannot be built, reads no such windows, or too little of it can be pruned, and for workers of a cluster."""
    workers = _count_workers(settings)
    model, reading = build_empty(settings)
    lead = read_lead(settings) if lead is None else lead
    refuse_long_windows(model, settings.window, lead)
    layers = find_layers(model)
    reach = measure_reach(model, layers)
    refuse_small_reach(reach, partial=settings.partial)
    read = settings.model_copy(update={"window": lead + settings.window})
    return Run(settings, read, model, reading, layers, lead, reach, workers, cut_parts(settings, workers))


def find_place(settings: TeamSettings, model: Any, devices: Devices | None) -> Place:
    """On what the run is done, of the devices told of or else of those that are here. Raises UserError."""
    here = torch.cuda.is_available()
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not here)
    device = "cpu" if on_cpu or (settings.device == "stream" and not here and devices is None) else "cuda"
    told, devices = devices is not None, devices or find_devices(device)
    spread = lay_out(model, devices) if settings.device == "spread" else []
    whole = sum(parameter.nbytes for parameter in model.parameters())
    held = devices is None or count_models(settings, device) * whole <= FITS * devices.bytes
    streams = settings.device == "stream" or (settings.device == "auto" and not held)
    return Place(device, devices, told, measure_stream(model) if streams else None, spread)


def settle(
    run: Run, place: Place, facts: Facts, course: Course, cutting: Cutting | None, room: float
) -> tuple[Place, BothWays, Phases]:
    """The place, with the model streamed where `auto` finds that a run which holds it does not fit; what is written
    where there is so much `room`; and all phases. Raises UserError where a polish cannot be."""

    def measure(place: Place) -> tuple[BothWays, Phases]:
        disk = _plan_both_ways(run, place, course, cutting, room)
        return disk, _list_all_phases(run, place, facts, course, cutting, anew=disk.plan.at_once is not None)

    disk, phases = measure(place)
    if run.settings.device == "auto" and not _holds(run, place, phases, course):
        place = place._replace(streamed=measure_stream(run.model))
        disk, phases = measure(place)
    return place, disk, phases


def _holds(run: Run, place: Place, phases: Phases, course: Course) -> bool:
    """Whether what a run holds fits, of a model that is held; so it is taken to where it must be."""
    needs_whole = bool(course.polishes) or (course.cut is not None and not course.cut.size)
    if place.streamed or place.devices is None or needs_whole:
        return True
    return find_needed(phases.own, phases.of_worker, place.device, run.workers)[0] <= HELD * place.devices.bytes


def choose_for_run(settings: TeamSettings, course: Course, directory: Path) -> TeamSettings:
    """As `choose_device`, and by all that a run of this course holds beside the model, which writes to the directory.

    A cluster is not asked. Raises UserError as `load_model`.
    """
    if is_settled(settings):
        return settings
    try:
        run = read_run(settings, lead=1)
        held = fits(run.model, settings) and _holds_here(run, course, directory)
    except Exception:  # what cannot be foreseen goes by its weights, and what is wrong with it is said
        return choose_device(settings)
    return settings if held else settings.model_copy(update={"device": "stream"})


def _holds_here(run: Run, course: Course, directory: Path) -> bool:
    """Whether what the run holds fits the memory that is free, of a model whose weights do."""
    device = pick_device("auto").type
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else count_free() + measure_process()
    place = Place(device, Devices(count=1, bytes=free), told=False, streamed=None, spread=[])
    cutting = find_cutting(run.model, run.layers, course.cut) if course.cut else None
    counts = count_block(run.model, run.settings.window, run.lead)
    facts = gather_facts(run, place, counts, course, cutting)
    room = run.settings.disk * 1e9 or count_free_disk(directory)
    return settle(run, place, facts, course, cutting, room)[0].streamed is None


def gather_facts(run: Run, place: Place, counts: Counts, course: Course, cutting: Cutting | None) -> Facts:
    """What the bytes of a run are reckoned from, on a device of `place`."""
    forms = [(layer.weight_OI.shape[0], layer.weight_OI.shape[1]) for layer in run.layers]
    methods = {*([] if cutting else LEVERS), *(recipe.method for recipe, _ in course.pruned)}
    held = count_layer(forms, run.layers[0].weight_OI.dtype, methods)
    shape = measure_shape(run.model, run.layers, counts.routed)
    room = math.inf if place.told else count_room()
    return Facts(shape, counts, held, measure_process(), run.reading, place.device, room)


def count_free_disk(directory: Path) -> int:
    """Bytes, where a directory is or will be."""
    present = next(path for path in [directory.resolve(), *directory.resolve().parents] if path.exists())
    return shutil.disk_usage(present).free


def _plan_both_ways(run: Run, place: Place, course: Course, cutting: Cutting | None, room: float) -> BothWays:
    """Without any room second moments are of one block at a time, with any amount all are kept, beside a polish."""
    waiting = count_waiting(run.settings.count_all("calibration"))
    in_source = read_source(run.settings, run.layers) if place.streamed else set[str]()
    polish = count_polish_disk(run.model, run.layers, run.settings, run.lead, course)

    def plan(room: float) -> DiskPlan:
        return plan_disk(
            *(run.model, run.layers, run.settings, room, run.lead),
            streamed=place.streamed is not None,
            in_source=in_source,
            waiting=waiting,
            checkpoints=course.checkpoints,
            sizes=cutting.sizes if cutting else None,
        )

    chosen = plan(room - polish)
    return BothWays(chosen, plan(0 if chosen.at_once is None else math.inf))


def _list_all_phases(
    run: Run, place: Place, facts: Facts, course: Course, cutting: Cutting | None, *, anew: bool
) -> Phases:
    """The phases with those of a polish, or of a cut. Raises UserError where a polish cannot be."""
    read, workers, parts, streamed = run.read, run.workers, run.parts, place.streamed
    part = max((line.bytes for line in place.spread), default=facts.shape.weights)
    phases = list_phases(facts, read, find_busiest(parts), part, streamed=streamed, anew=anew)
    beside = list_phases_beside(facts, read, parts, streamed=streamed, anew=anew) if workers else []
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
    return Phases(beside or phases, phases if workers else [], _list_polish_disk(facts, polish) if polish else [])


def _list_polish_disk(facts: Facts, polish: Polish) -> list[Line]:
    windows, shape = len(polish.schedule.windows), facts.shape
    return list_polish_disk(polish.survivors, polish.place.means, windows, polish.window, shape.hidden, shape.item)


def _schedule_polish(settings: TeamSettings, course: Course) -> Schedule | None:
    """The longest polish of a course; None where there is none. Raises UserError where the text is too short for it."""
    if not course.polishes:
        return None
    try:
        windows = course.count_fitted(settings)
        return schedule_polish(windows, settings.window, max(course.polishes), settings.seed)
    except ImpossiblePlan as error:
        raise UserError(str(error)) from error


def _count_workers(settings: TeamSettings) -> int:
    """0 where there are none. Raises UserError for those of a cluster, which is not asked."""
    if settings.workers and not settings.workers.isdigit():
        raise UserError(
            f"how many workers {settings.workers} has is not asked here; give their number, such as --workers 8"
        )
    return int(settings.workers or 0)
