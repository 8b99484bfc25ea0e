"""Whether a run fits: what its phases hold at once, and where the model is held for that.

Each phase is a sum of buffers that were counted in the code: of the whole model where it is held, of the largest block,
of the largest layer and of the output head. `SLACK` is for what allocators lose. All of it was set beside measured
peaks: of SmolLM2-135M in fp32, and of a model of 1.5 billion weights in bf16, held and streamed.
"""

import gc
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.base.errors import UserError
from tools.base.memory import count_free, count_memory, measure_peak
from tools.base.settings import TeamSettings, count_beside
from tools.estimate.empty import Empty, build_empty
from tools.measure.losses import PREFIX_SHARE
from tools.models.layers import find_blocks
from tools.models.load import FITS, choose_device, count_models, fits, is_settled, pick_device, spread_blocks
from tools.models.readout import CHUNK
from tools.models.streamed import StreamSizes, measure_stream
from tools.plans.layer_profile import LEVELS
from tools.plans.recipe import Recipe
from tools.polish.gradients import count_state_bytes
from tools.statistics.shards import count_held, cut_shards, share_out
from tools.texts.written import BATCH, list_written

SLACK = 1.2
"""Bytes that a process takes for each that is counted."""

HELD = 0.95
"""Share of the memory that is free which a run may need for `auto` to hold the model."""

ALONE = ("continue prompts", "write texts", "export")
"""Phases in which workers wait."""


class CutCourse(NamedTuple):
    """What a run is expected to do that takes parts away."""

    rounds: int
    size: float
    """Share of the model's bytes that is to stay."""
    align: int
    """Of what the neurons that stay are a multiple."""


class Course(NamedTuple):
    """What a run is expected to do."""

    recipes: Sequence[Recipe] = ()
    """By what all layers are pruned, one time after another."""
    trials: int = 0
    """Models that are measured on the validation text."""
    tests: int = 0
    """Models that are measured on the test text."""
    polish_tokens: int = 0
    """Of the longest polish."""
    polished_at: float = 0.0
    """The least sparsity that is polished."""
    cut: CutCourse | None = None
    checkpoints: int | None = None
    """Whose layers lie on disk at once, at most; None: as many as `count_checkpoints` has it."""


class Devices(NamedTuple):
    """What the model may be put on: so many GPUs of one size, or the memory of a machine whose CPU is the device."""

    number: int
    bytes: int
    """Memory of each."""


class Phase(NamedTuple):
    """What one process holds in one phase of a run, at most."""

    name: str
    device: float
    """Bytes on the device that the model runs on."""
    host: float
    """Bytes of CPU memory beside them."""


class Place(NamedTuple):
    """Where the work is done, and what it holds there."""

    device: str
    """cpu or cuda."""
    devices: Devices | None
    streamed: StreamSizes | None
    """None where the model is held."""
    spread: list[int]
    """What each GPU holds of a model that is laid over them, bytes; empty if it is not."""
    phases: list[Phase]
    """Of this process; with workers, of the one that they work for."""
    of_worker: list[Phase]

    def count_needed(self, workers: int) -> tuple[float, str]:
        """(bytes that one device must hold at most, in which phase): a GPU, which the first worker shares with the
        process that it works for, or the memory of all processes where the CPU is the device."""
        mates = {phase.name: phase for phase in self.of_worker}
        if self.device == "cpu":
            found = {p.name: (p.device + p.host, mates.get(p.name)) for p in self.phases}
            return max((own + (workers * (m.device + m.host) if m else 0), name) for name, (own, m) in found.items())
        return max((p.device + (mates[p.name].device if p.name in mates else 0), p.name) for p in self.phases)

    def count_host(self, workers: int) -> float:
        """Bytes of CPU memory of all processes beside their GPUs, at most."""
        mates = {phase.name: phase.host for phase in self.of_worker}
        return max(phase.host + workers * mates.get(phase.name, 0) for phase in self.phases)


def read_devices(text: str) -> Devices:
    """`"80"`, or `"8x80"` for eight of them, in GB. Raises UserError for another form."""
    form = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\d{1,6}(?:\.\d+)?)", text, re.ASCII)
    if form is None or float(form[2]) == 0:
        raise UserError(f"device memory {text!r} is neither GB, such as 80, nor COUNTxGB, such as 8x80")
    return Devices(number=int(form[1] or 1), bytes=round(float(form[2]) * 1e9))


def find_place(empty: Empty, settings: TeamSettings, course: Course, devices: Devices | None, process: int) -> Place:
    """On what the run is done, of the devices told of or else of those that are here; a process without a model holds
    `process` bytes. With `auto` the model is streamed where what the run holds would not fit. Raises UserError."""
    here = torch.cuda.is_available()
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not here)
    device = "cpu" if on_cpu or (settings.device == "stream" and not here and devices is None) else "cuda"
    devices = devices or _find_devices(device)
    spread = _lay_out(empty.model, devices) if settings.device == "spread" else []
    stream = measure_stream(empty.model)

    def measure(streamed: StreamSizes | None) -> Place:
        phases, of_worker = _list_phases(empty, settings, course, device, streamed, max(spread, default=0), process)
        return Place(device, devices, streamed, spread, phases, of_worker)

    held = measure(stream if settings.device == "stream" else None)
    if settings.device != "auto" or devices is None:
        return held
    if count_models(settings, device) * empty.bytes > FITS * devices.bytes:
        return measure(stream)
    workers = count_beside(settings)
    fit = course.polish_tokens > 0 or held.count_needed(workers)[0] <= HELD * devices.bytes  # a polish needs it held
    return held if fit else measure(stream)


def choose_for_run(settings: TeamSettings, course: Course) -> TeamSettings:
    """As `choose_device`, and by all that a run of this course holds beside the model. Raises UserError as
    `load_model`."""
    if is_settled(settings):
        return settings
    try:
        empty, process = build_empty(settings, lead=1), measure_process()
        free = torch.cuda.mem_get_info()[0] if pick_device("auto").type == "cuda" else count_free() + process
        place = find_place(empty, settings, course, Devices(1, free), process)
        held = fits(empty.model, settings) and place.streamed is None
    except Exception:  # what cannot be foreseen goes by its weights, and what is wrong with it is said
        return choose_device(settings)
    return settings if held else settings.model_copy(update={"device": "stream"})


def measure_process() -> int:
    """Bytes of this process as it is, without a model."""
    gc.collect()
    told = Path("/proc/self/status")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    resident = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return 1024 * resident[0] if resident else measure_peak()


def _find_devices(device: str) -> Devices | None:
    """The GPUs that are here, as alike as the smallest, or this machine's memory; None where there is no GPU."""
    if device == "cpu":
        return Devices(number=1, bytes=count_memory())
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return Devices(number=len(sizes), bytes=min(sizes)) if sizes else None


def _lay_out(model: Any, devices: Devices | None) -> list[int]:
    """What each GPU holds of a model that is laid over them. Raises UserError when there are none, or too few."""
    if devices is None:
        raise UserError("torch sees no GPU here to spread the model over; plan for others with --device-memory 8x80")
    places = spread_blocks(model, dict.fromkeys(range(devices.number), devices.bytes))
    sizes = [0] * devices.number
    for name, parameter in model.named_parameters():
        on = next(place for part, place in places.items() if not part or f"{name}.".startswith(f"{part}."))
        sizes[on] += parameter.nbytes
    return sizes


# --- phases ----------------------------------------------------------------------------------------------------------


def _list_phases(
    empty: Empty,
    settings: TeamSettings,
    course: Course,
    device: str,
    streamed: StreamSizes | None,
    part: int,
    process: int,
) -> tuple[list[Phase], list[Phase]]:
    """The phases of this process and those of each worker. `part` is the most that one GPU holds of a model that is
    spread over several."""
    model, layers, workers = empty.model, empty.layers, count_beside(settings)
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight
    item, tokens, cpu = head.itemsize, empty.lead + settings.window, device == "cpu"
    whole, prunable = empty.bytes, sum(layer.weight_OI.nbytes for layer in layers)
    widest, largest = max(x.weight_OI.shape[1] for x in layers), max(x.weight_OI.numel() for x in layers)
    experts = len({layer.name for layer in layers if layer.pool and layer.block == layers[-1].block})
    routed = getattr(config, "num_experts_per_tok", 1) / (getattr(config, "num_experts", 0) or experts or 1)
    flows, moments, members = Counter[int](), Counter[int](), Counter[int]()
    for x in layers:
        outputs, inputs = x.weight_OI.shape
        flows[x.block] += round((outputs + inputs) * (min(routed, 1) if x.pool else 1))
        moments[x.block] += 4 * inputs**2
        members[x.block] += outputs * inputs
    flow, moment, block = tokens * max(flows.values()), max(moments.values()), max(members.values())

    def state(windows: float) -> float:
        """What blocks pass on of so many windows."""
        return float(windows * tokens * head.shape[1] * item)

    def share(windows: int) -> int:
        return math.ceil(windows / max(workers, 1))

    logits = CHUNK * head.shape[0] * 4
    calibration, validation = settings.count_all("calibration"), settings.count_all("validation")
    sums = max(
        count_held((0, n), span, aside=streamed is not None)
        for n in [len(cut_shards(calibration))]
        for span in share_out(n, max(workers, 1))
    )
    if streamed is None:
        held: float = part or whole
        prefixes = 0 if part else min(PREFIX_SHARE * whole, state(share(validation)) * len(find_blocks(model)))
        resting: float = prunable  # the dense weights, mapped into memory
    elif cpu:  # the pages that a block was copied from may be in memory beside it
        held, prefixes, resting = 2 * streamed.block + streamed.outside, 0, 0
    else:
        held, prefixes, resting = max(streamed.block, streamed.head) + streamed.others, 0, streamed.outside
    texts = 2 if settings.mixes_questions or len(settings.mixable) > 1 else 1
    forward, walked = 3 * flow * item, state(texts * calibration)
    flowing = texts * share(settings.back_propagated) * flow * item + 2 * 4 * tokens * widest
    backward = 6 * flow * item + 6 * logits + flowing
    layer = 4 * (3 * widest**2 + 6 * largest) * texts
    levels = 4 * (2 * widest**2 + len(LEVELS) * largest) * texts
    # to multiply one token by a matrix of 16 bits, torch makes one of 32 out of it on a CPU
    words = 2 * 4 * head.numel() if item < 4 and cpu else logits
    kept, three = prefixes if cpu else 0, state(3 * share(validation))
    found = {
        "load": (0.0, 0.0, empty.reading if streamed is None else 2 * block * item),
        "validate": (forward + 4 * logits, kept + three, 0.0),
        "profile, statistics": (forward + sums * moment, kept + walked, 0.0),
        "profile, gradients": (max(backward, flowing + levels), kept + state(3 * settings.back_propagated), 0.0),
        "prune": (layer + moment, kept + walked, 0.0),
        "continue prompts": (words, kept, 0.0),
    }
    if streamed is not None and cpu:
        found["export"] = (0.0, 0.0, 0.0)
    if course.cut:
        del found["profile, statistics"]
        found["curves and cut"] = (backward + 8 * 3 * widest**2 + moment, kept + 2 * walked, 0.0)
        found["build the smaller model"] = (course.cut.size * whole if streamed is None else 0.0, kept, 0.0)
    if list_written(settings):  # as many keys and values as attention can have; logits of the next token, three times
        documents = 2 * len(find_blocks(model)) * settings.window * head.shape[1] * item + 3 * head.shape[0] * 4
        found["write texts"] = (forward + BATCH * documents, 0.0, 0.0)
    if course.polish_tokens:
        survivors = empty.weights - math.floor(course.polished_at * empty.weights)
        own = survivors * (count_state_bytes(item, "fp32") + 4 * 2) + empty.weights
        found["polish"] = (backward + own + state(len(find_blocks(model))), state(settings.count_fitted()), 0.0)

    def phase(name: str, buffers: float, beside: float, read: float) -> Phase:
        moved = whole if name == "load" and not cpu and streamed is None else 0  # through CPU memory to the GPU
        written = whole if name == "export" else 0  # the files, whose pages stay in memory while there is room
        return Phase(name, SLACK * (held + buffers), process + written + SLACK * (beside + read + resting + moved))

    if not workers:
        return [phase(name, *sizes) for name, sizes in found.items()], []
    # the process that workers work for holds the model, what they answer, and what they are given in shared memory
    given = 3 * block * item + 2 * sums * moment + state(3 * validation)
    main = [phase(name, sizes[0] if name in ALONE else 0.0, given, sizes[2]) for name, sizes in found.items()]
    return main, [phase(name, *sizes) for name, sizes in found.items() if name not in ALONE]
