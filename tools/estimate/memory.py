"""What is held in memory in each phase of a run: sums of lines, each a product over shapes and sizes, or counted.

What a forward, a backward, the output head and a method of pruning hold was counted while they ran
(`tools.estimate.block`, `tools.estimate.pruning`). The lines are bounds: no two layers are taken to share their input,
though q, k and v do; gate and up of a fused expert are known to. On a GPU only tensors are counted, not what CUDA
itself takes.
"""

import gc
import math
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field

from tools.base.settings import WorkbenchSettings
from tools.estimate.block import Counts
from tools.estimate.pruning import Held
from tools.estimate.shape import Shape, count_once, list_backward, multiply, name_chunk
from tools.measure.losses import PREFIX_SHARE
from tools.models.disk import Line
from tools.models.streamed import SHARD, StreamSizes
from tools.plans.layer_profile import LEVELS
from tools.statistics.shards import count_held, cut_shards, list_nodes, share_out
from tools.texts.written import BATCH, list_written

ASKED_FOR = "KL curves of a method, where a plan asks for them"
"""A phase that not every run has."""

WRITE = "write text"
"""A phase of runs whose texts the model writes."""

WEIGH = "weigh tokens, as a plan asks for it"
"""Another one, which is there where one asks."""

IN_ORDER = "prune block by block, where a plan asks for it"
"""Another one."""


class Phase(BaseModel):
    """What is held at once in one phase of a run, at most."""

    name: str
    device: list[Line] = Field(description="On the device that the model runs on.")
    host: list[Line] = Field(description="In CPU memory; where the device is the CPU, beside the lines of the device.")
    store: list[Line] = Field([], description="In Ray's object store, in the memory of the machine with workers.")

    @property
    def device_bytes(self) -> int:
        """Sum of the lines of the device."""
        return sum(line.bytes for line in self.device)

    @property
    def host_bytes(self) -> int:
        """Sum of the lines of the CPU."""
        return sum(line.bytes for line in self.host)

    @property
    def store_bytes(self) -> int:
        """Sum of the lines of the object store."""
        return sum(line.bytes for line in self.store)

    @property
    def bytes(self) -> int:
        """Those of device and CPU together, as on a machine whose device is the CPU."""
        return self.device_bytes + self.host_bytes


def find_common(phases: Sequence[Phase], place: str) -> list[Line]:
    """The lines of the device, or the host, that all phases have once the model is loaded."""
    lines: list[list[Line]] = [getattr(phase, place) for phase in phases[1:] if phase.name != WRITE]
    return [line for line in lines[0] if all(line in others for others in lines)]


# --- shares ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """How much of the texts one process works on, at most."""

    calibration: int
    """Windows; of the others as well."""
    gradient: int
    validation: int
    sums: int
    """Sums over shards that are held at once."""
    nodes: int
    """Sums over shards that are handed over."""
    passed: int
    """Blocks of which what flowed back is held."""
    workers: int
    """How many there are; 0 for the one process that does it all."""


def cut_parts(settings: WorkbenchSettings, workers: int) -> list[Part]:
    """What each worker does of the calibration text, beside the busiest one's share of the validation text; all of it
    without any workers."""
    shards, count = cut_shards(settings.count_all("calibration")), max(workers, 1)
    validation = max(end - first for first, end in share_out(settings.count_all("validation"), count))
    parts = []
    for span in share_out(len(shards), count):
        windows = [window for shard in range(*span) for window in shards[shard]]
        nodes = list(list_nodes((0, len(shards)), span))
        parts.append(
            Part(
                calibration=len(windows),
                gradient=sum(window % settings.calibration_windows < settings.gradient_windows for window in windows),
                validation=validation,
                sums=count_held((0, len(shards)), span),
                nodes=len(nodes),
                passed=2 if workers else 1,
                workers=workers,
            )
        )
    return parts


def find_busiest(parts: Sequence[Part]) -> Part:
    return Part(*(max(numbers) for numbers in zip(*parts, strict=True)))


# --- phases --------------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What is known of the model, of the code that runs on it, and of this machine."""

    shape: Shape
    counts: Counts
    held: Held
    process: int
    """Bytes of a process that holds no model."""
    reading: int
    """Bytes that reading the model's file takes beside the model."""
    device: str
    """cpu or cuda."""


def list_phases(
    facts: Facts,
    settings: WorkbenchSettings,
    part: Part,
    weights: int,
    *,
    weighs: bool = False,
    streamed: StreamSizes | None = None,
    anew: bool = False,
) -> list[Phase]:
    """What each phase holds in a process that works on `part`, with its arithmetic.

    `weights` is what one device holds of the model, bytes, which of one that is `streamed` are not looked at. `weighs`
    says whether tokens are weighed, `anew` whether second moments are not kept.
    """
    shape, counts, held = facts.shape, facts.counts, facts.held
    state = (settings.window, "tokens"), (shape.hidden, "wide"), (shape.item, "bytes")
    flow = (settings.window, "tokens"), (shape.flow, "numbers into and out of layers"), (shape.item, "bytes")
    validated = settings.count_all("validation") * settings.window * shape.hidden * shape.item
    kept = 0 if streamed else _count_kept(shape, validated)

    def states(what: str, *factors: tuple[float, str]) -> Line:
        return multiply(what, *factors, *state)

    other = [] if part.workers else list_other_moment(shape, settings)

    def pruned(what: str, size: int) -> list[Line]:
        moment = multiply("its second moment", (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes"))
        return [count_once(what, size, "a smaller layer of the same form"), moment, *other]

    model = _describe_streamed(facts, streamed) if streamed else _describe_model(shape, weights)
    program = describe_program(facts)
    always = [
        program,
        states("inputs of every few blocks, validation text", (kept, "blocks"), (part.validation, "windows")),
    ]
    forward = count_once("forward of one block", counts.forward_bytes)
    evaluation = [
        model,
        forward,
        states("inputs of every few blocks, one window", (kept, "blocks")),
        count_once("logits of a chunk, beside the dense model's", counts.loss_bytes, name_chunk(shape)),
    ]
    passed, gradients = ((part.passed, "blocks"),) if part.passed > 1 else (), ((part.gradient, "windows"),)
    mixed = ((2, "texts"),) if settings.mixes_questions else ()  # where a plan's mix has both
    away = streamed is not None and facts.device != "cpu"  # what flowed back through a block lies in CPU memory

    def list_flow(*texts: tuple[int, str]) -> list[Line]:
        return [multiply("inputs and output gradients of one block's layers", *passed, *texts, *gradients, *flow)]

    def list_flow_at_hand(*texts: tuple[int, str]) -> list[Line]:
        """On the device."""
        of_window = (settings.window, "tokens"), (shape.flow_layer, "numbers")
        of_layer = (*texts, *gradients, *of_window, (shape.item, "bytes"))
        lines = [multiply("those of one layer", *of_layer)] if away else list_flow(*texts)
        if shape.item < 4:
            lines.append(multiply("those of one layer and window in fp32", *of_window, (4, "bytes")))
        return lines

    backward = [model, *list_backward(shape, counts)]
    weigh = Phase(
        name=WEIGH,
        device=[*backward, multiply("inputs and output gradients of one block's layers", *flow)],
        host=[
            *always,
            states("inputs of one block", (part.calibration, "windows")),
            states("gradients passed on", (part.calibration, "windows")),
        ],
    )
    making = min(part.sums, part.nodes + 1) if streamed else part.sums  # others wait on disk
    sums = _count_moments(shape, making, "sums over shards in the making")
    statistics = [model, forward, sums]
    if shape.item < 4:
        tokens = (settings.window, "tokens"), (shape.widest, "inputs of the widest layer")
        statistics.append(multiply("inputs of one layer in fp32", *tokens, (4, "bytes")))

    def walked(*texts: tuple[int, str]) -> Line:
        return states("inputs and outputs of one block", *texts, (2, "sets"), (part.calibration, "windows"))

    collected = [sums] if anew else []  # whenever layers are pruned
    layer = pruned("one layer being pruned", held.pruned)
    levels = [*list_flow_at_hand(*mixed), *pruned(f"one layer pruned to {len(LEVELS)} levels", held.levels)]
    before = [*collected, *([] if away else list_flow(*mixed))]  # what flowed back through the last block is still held
    moved = _pass_through(streamed) if streamed else _move_model(facts)
    read = [] if streamed else _read_file(facts)
    straight = settings.device == "spread"  # accelerate puts each weight where it belongs
    handed = facts.device != "cpu" and part.workers
    answer = [_count_moments(shape, part.nodes, "sums handed over")] if handed else []
    passing = [walked(*mixed), *answer] if anew else []
    reference = [states("dense hidden states as received", (settings.count_all("validation"), "windows"))]
    job = _list_job(shape) if part.workers else []
    return [
        Phase(name="load", device=[model], host=[program, *read, *([] if straight else moved)]),
        *([_describe_writing(facts, settings, model)] if list_written(settings) and not part.workers else []),
        Phase(
            name="validate the dense model",
            device=evaluation,
            host=[*always, states("hidden states", (2, "copies"), (part.validation, "windows"))],
        ),
        Phase(name="profile, statistics", device=statistics, host=[*always, walked(), *answer]),
        Phase(
            name="profile, gradients",
            device=[
                *backward,
                *list_flow_at_hand(),
                count_once("levels of one layer's KL curve", held.curve, "a smaller layer of the same form"),
            ],
            host=[
                *always,
                *(list_flow() if away else []),
                states("inputs of one block", (part.gradient, "windows")),
                states("gradients passed on", (2, "losses"), (part.gradient, "windows")),
            ],
        ),
        *([weigh] if weighs else []),
        Phase(
            name=ASKED_FOR,
            device=[*backward, *([*collected, *levels] if part.workers else max(before, levels, key=_add_up))],
            host=[
                *always,
                *passing,
                *(list_flow(*mixed) if away else []),
                states("inputs of one block", *mixed, (part.gradient, "windows")),
                states("gradients passed on", *mixed, (part.gradient, "windows")),
                *([*job, _count_levels(shape)] if part.workers else []),
            ],
        ),
        Phase(
            name="prune",
            # a block's moments are there before its layers are pruned; workers are told ahead
            device=[model, *([*collected, *layer] if part.workers else max(collected, layer, key=_add_up))],
            host=[*always, *passing, *job],
        ),
        Phase(
            name=IN_ORDER,
            device=[model, *([] if part.workers else [_count_moments(shape, 1)]), *layer],
            host=[*always, walked(*mixed), *answer, *job],
        ),
        Phase(
            name="validate",
            device=evaluation,
            host=[
                *always,
                *([*job[:1], *reference] if part.workers else []),
                states("hidden states", (2 if part.workers else 3, "copies"), (part.validation, "windows")),
            ],
        ),
        Phase(name="export", device=[model], host=[*always, *([] if part.workers else moved)]),
    ]


def _add_up(lines: Sequence[Line]) -> int:
    return sum(line.bytes for line in lines)


def list_other_moment(shape: Shape, settings: WorkbenchSettings) -> list[Line]:
    """What is held of a second text while the second moments of several are added up."""
    matrix = (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")
    return [multiply("that of another text, to be added", *matrix)] if len(settings.mixable) > 1 else []


def list_phases_beside(
    facts: Facts,
    settings: WorkbenchSettings,
    parts: Sequence[Part],
    *,
    weighs: bool = False,
    streamed: StreamSizes | None = None,
    anew: bool = False,
) -> list[Phase]:
    """As `list_phases`, of the process that workers with these `parts` work for, and of their object store."""
    shape, workers, nodes = facts.shape, parts[0].workers, sum(part.nodes for part in parts)
    model = _describe_streamed(facts, streamed) if streamed else _describe_model(shape, shape.weights)
    moved = _pass_through(streamed) if streamed else _move_model(facts)
    read = [] if streamed else _read_file(facts)
    program = describe_program(facts)

    def hidden(what: str, count: int) -> Line:
        states = (settings.count_all("validation"), "windows"), (settings.window, "tokens")
        copies = ((count, "copies"),) if count > 1 else ()
        return multiply(what, *copies, *states, (shape.hidden, "wide"), (shape.item, "bytes"))

    matrix = (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")
    given = [
        Line(what="dense weights", how="the prunable layers, each put there once", bytes=shape.prunable),
        multiply("second moments of layers to prune", (2 * workers, "layers"), *matrix),
    ]
    moment, other = multiply("second moment of one layer", *matrix), list_other_moment(shape, settings)
    levels, sums = _count_levels(shape), _count_moments(shape, nodes, "sums of all workers")
    two = _count_moments(shape, 2 * nodes, "sums of all workers for two blocks")
    collected, coming = ([sums], [two]) if anew else ([], [])  # whenever layers are pruned
    results = multiply("pruned layers of one block", (shape.members, "weights"), (shape.item + 1 / 8, "bytes"))
    return [
        Phase(name="load", device=[model], host=[program, *read, *moved]),
        *([_describe_writing(facts, settings, model)] if list_written(settings) else []),
        Phase(
            name="validate the dense model",
            device=[model],
            host=[program, hidden("hidden states", 2)],
            store=[hidden("hidden states", 1)],
        ),
        Phase(name="profile, statistics", device=[model], host=[program, sums], store=[two]),
        Phase(name="profile, gradients", device=[model], host=[program]),
        *([Phase(name=WEIGH, device=[model], host=[program])] if weighs else []),
        Phase(
            name=ASKED_FOR,
            device=[model, moment, *other],
            host=[program, *collected],
            store=[*given, levels, *coming],
        ),
        Phase(
            name="prune",
            device=[model, moment, *other],
            host=[program, *collected],
            store=[*given, results, *coming],
        ),
        Phase(name=IN_ORDER, device=[model, moment], host=[program, sums], store=[*given, results, two]),
        Phase(
            name="validate",
            device=[model],
            host=[program, hidden("hidden states", 1)],
            store=[given[0], _count_pruned(shape), hidden("hidden states", 1)],
        ),
        Phase(name="export", device=[model], host=[program, *moved], store=[given[0]]),
    ]


def describe_program(facts: Facts) -> Line:
    """What a process holds without any model."""
    return Line(what="Python, torch and transformers", how="measured in this process", bytes=facts.process)


def _read_file(facts: Facts) -> list[Line]:
    """Nothing where the file is mapped and its weights are used as they are."""
    line = Line(what="its file as it is read", how="mapped, and converted in part", bytes=facts.reading)
    return [line] if facts.reading else []


def _move_model(facts: Facts) -> list[Line]:
    """Weights pass through CPU memory on their way to a GPU, and back."""
    line = Line(what="the model on its way", how="all parameters", bytes=facts.shape.weights)
    return [] if facts.device == "cpu" else [line]


def _describe_writing(facts: Facts, settings: WorkbenchSettings, model: Line) -> Phase:
    """What the process that loads the model first holds while that writes text; nothing is copied from it yet.

    As many keys and values as attention can have: most architectures have fewer heads of them.
    """
    shape = facts.shape
    documents = (BATCH, "documents"), (settings.window, "tokens")
    kept = (2, "keys and values"), (shape.blocks, "blocks"), *documents, (shape.hidden, "wide"), (shape.item, "bytes")
    drawn = (3, "copies"), (BATCH, "documents"), (shape.vocabulary, "words"), (4, "bytes")
    return Phase(
        name=WRITE,
        device=[
            model,
            count_once("forward of one block", facts.counts.forward_bytes),
            multiply("keys and values, at most", *kept),
            multiply("logits of the next token", *drawn),
        ],
        host=[describe_program(facts)],
    )


def _describe_model(shape: Shape, weights: int) -> Line:
    if weights == shape.weights:
        return Line(what="the model", how="all parameters, each once", bytes=weights)
    return Line(what="the model's part on one GPU", how="the largest of these parts", bytes=weights)


def _describe_streamed(facts: Facts, sizes: StreamSizes) -> Line:
    """On a CPU the pages that a block was copied from may be in memory beside it."""
    blocks = 2 if facts.device == "cpu" else 1
    how = f"{blocks} × the largest block, with embeddings and head"
    return Line(what="of the model, which is streamed", how=how, bytes=blocks * sizes.block + sizes.outside)


def _pass_through(sizes: StreamSizes) -> list[Line]:
    """What passes through CPU memory where a model that is streamed is read from files, or written to them."""
    return [Line(what="one of its files", how="at most", bytes=max(SHARD, sizes.outside))]


def _count_moments(shape: Shape, count: int, what: str = "") -> Line:
    how = f"{f'{count} {what}' if count > 1 else 'one sum'} × 4 bytes × inputs², over its layers"
    return Line(what="second moments of one block", how=how, bytes=count * shape.moments)


def _count_levels(shape: Shape) -> Line:
    what = f"one block's layers at {len(LEVELS)} levels"
    return multiply(what, (len(LEVELS), "levels"), (shape.members, "weights of its layers"), (4, "bytes"))


def _count_pruned(shape: Shape) -> Line:
    return Line(what="pruned layers", how="all prunable layers, with a bit for each weight's mask", bytes=shape.packed)


def _list_job(shape: Shape) -> list[Line]:
    """What a worker holds of the layers that it prunes, which are those of one block at most; the first line, too, of
    those that it is given, one after another."""
    matrix = (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")
    weights = (2, "copies"), (shape.members, "weights of one block"), (shape.item, "bytes")
    return [multiply("layers as received and as pruned", *weights), multiply("second moment as received", *matrix)]


def _count_kept(shape: Shape, size: int) -> int:
    """Of how many blocks the validation text's inputs are kept, at `size` bytes each (`PrefixCache`)."""
    step = math.ceil(shape.blocks * size / max(int(PREFIX_SHARE * shape.weights), 1))
    return len(range(step, shape.blocks, step))


def measure_process() -> int:
    """Bytes of this process as it is, which has run what a run runs, and let go of it."""
    gc.collect()
    told = Path("/proc/self/status")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    resident = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return 1024 * (resident[0] if resident else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
