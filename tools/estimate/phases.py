"""What phases of a run are made of: lines of what is held in them, shares of the texts, what is known beforehand.

For a process that does the work (`tools.estimate.memory`), and for one that workers work for (`tools.estimate.beside`).
"""

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field

from tools.base.memory import measure_peak
from tools.base.settings import WorkbenchSettings
from tools.estimate.block import Counts
from tools.estimate.pruning import Held
from tools.estimate.shape import Shape, count_once, multiply
from tools.models.disk import Line
from tools.models.streamed import SHARD, StreamSizes
from tools.plans.layer_profile import LEVELS
from tools.statistics.shards import count_held, cut_shards, list_nodes, share_out
from tools.texts.written import BATCH

ASKED_FOR = "KL curves of a method, where a plan asks for them"
"""A phase that not every run has."""

WRITE = "write text"
"""A phase of runs whose texts the model writes."""

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


def count_host(phase: Phase, of_worker: Sequence[Phase], device: str, workers: int) -> int:
    """CPU memory of a phase of this process and, were they on the same machine, of all workers and their store."""
    mates = [other for other in of_worker if other.name == phase.name]
    parts = [phase, *(mate for mate in mates for _ in range(workers))]
    return phase.store_bytes + sum(p.bytes if device == "cpu" else p.host_bytes for p in parts)


def find_needed(phases: Sequence[Phase], of_worker: Sequence[Phase], device: str, workers: int) -> tuple[int, str]:
    """(most that one device must hold, in which phase): a GPU's process, or all processes where it is the CPU.

    Where there are workers, the first one's GPU is also that of the process that they work for.
    """
    if device == "cpu":
        return max((count_host(phase, of_worker, device, workers), phase.name) for phase in phases)
    mates = {phase.name: phase.device_bytes for phase in of_worker}
    return max((phase.device_bytes + mates.get(phase.name, 0), phase.name) for phase in phases)


def find_common(phases: Sequence[Phase], place: str) -> list[Line]:
    """The lines of the device, or the host, that all phases have once the model is loaded."""
    lines: list[list[Line]] = [getattr(phase, place) for phase in phases[1:] if phase.name != WRITE]
    return [line for line in lines[0] if all(line in others for others in lines)]


# --- shares ----------------------------------------------------------------------------------------------------------


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
    """The part of the most of everything: no device need have it all."""
    return Part(*(max(numbers) for numbers in zip(*parts, strict=True)))


# --- what is known ---------------------------------------------------------------------------------------------------


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
    states: float = math.inf
    """Bytes of CPU memory that what windows pass on between blocks may take, where the model is streamed."""


def measure_process() -> int:
    """Bytes of this process as it is, which has run what a run runs, and let go of it."""
    gc.collect()
    told = Path("/proc/self/status")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    resident = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return 1024 * resident[0] if resident else measure_peak()


# --- lines -----------------------------------------------------------------------------------------------------------


def describe_program(facts: Facts) -> Line:
    """What a process holds without any model."""
    return Line(what="Python, torch and transformers", how="measured in this process", bytes=facts.process)


def _list_reading(facts: Facts) -> list[Line]:
    """Nothing where the file is mapped and its weights are used as they are."""
    line = Line(what="its file as it is read", how="mapped, and converted in part", bytes=facts.reading)
    return [line] if facts.reading else []


def _list_moved(facts: Facts) -> list[Line]:
    """Weights pass through CPU memory on their way to a GPU, and back."""
    line = Line(what="the model on its way", how="all parameters", bytes=facts.shape.weights)
    return [] if facts.device == "cpu" else [line]


class Loading(NamedTuple):
    """What a process holds of the model, and while that is loaded or exported."""

    model: Line
    program: Line
    read: list[Line]
    moved: list[Line]


def describe_loading(facts: Facts, weights: int, streamed: StreamSizes | None) -> Loading:
    """`weights` is what one device holds of the model, bytes, which of one that is `streamed` are not looked at."""
    program = describe_program(facts)
    if streamed:
        return Loading(describe_streamed(facts, streamed), program, [], _list_passing(streamed))
    return Loading(_describe_model(facts.shape, weights), program, _list_reading(facts), _list_moved(facts))


def describe_writing(facts: Facts, settings: WorkbenchSettings, model: Line) -> Phase:
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


def describe_streamed(facts: Facts, sizes: StreamSizes) -> Line:
    """What is held of it: on a CPU the pages that a block was copied from may be in memory beside it; on a GPU the head
    comes by turn.
    """
    if facts.device == "cpu":
        how, size = "2 × the largest block, with embeddings and head", 2 * sizes.block + sizes.outside
    else:
        how, size = "the largest block, or the output head, and norms", max(sizes.block, sizes.head) + sizes.others
    return Line(what="of the model, which is streamed", how=how, bytes=size)


def list_both_held(facts: Facts, streamed: StreamSizes | None) -> list[Line]:
    """What is held beside either of the last block and the head, where a loss flows back through both."""
    if streamed is None or facts.device == "cpu":
        return []
    how = "the smaller of the largest block and the head"
    return [Line(what="the last block beside the output head", how=how, bytes=min(streamed.block, streamed.head))]


def _list_passing(sizes: StreamSizes) -> list[Line]:
    """What passes through CPU memory where a model that is streamed is read from files, or written to them."""
    return [Line(what="one of its files", how="at most", bytes=max(SHARD, sizes.outside))]


def count_moments(shape: Shape, count: int, what: str = "") -> Line:
    """Bytes of `count` second moments, fp32, of every input of one block."""
    how = f"{f'{count} {what}' if count > 1 else 'one sum'} × 4 bytes × inputs², over its layers"
    return Line(what="second moments of one block", how=how, bytes=count * shape.moments)


def count_levels(shape: Shape) -> Line:
    """Bytes of a block's layers as one method leaves them at every level, fp32."""
    what = f"one block's layers at {len(LEVELS)} levels"
    return multiply(what, (len(LEVELS), "levels"), (shape.members, "weights of its layers"), (4, "bytes"))


def list_other_moment(shape: Shape, settings: WorkbenchSettings) -> list[Line]:
    """What is held of a second text while the second moments of several are added up."""
    matrix = (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")
    return [multiply("that of another text, to be added", *matrix)] if len(settings.mixable) > 1 else []
