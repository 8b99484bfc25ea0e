"""What a polish will need: memory and disk, as of one that takes all of its steps."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tools.base.settings import TeamSettings
from tools.estimate.course import Course
from tools.estimate.phases import Facts, Phase, find_common
from tools.estimate.room import Room
from tools.estimate.shape import list_backward, multiply
from tools.estimate.work import POLISH
from tools.models.disk import Line
from tools.models.layers import Layer
from tools.models.readout import CHUNK
from tools.plans.polish import Means, Schedule
from tools.polish.survivors import MEAN_BYTES, Place, count_state_bytes, place_state
from tools.statistics.shards import count_held, list_nodes, share_out


class Polish(NamedTuple):
    """The longest polish of a run."""

    schedule: Schedule
    survivors: int
    """Weights that are not zero."""
    window: int
    """Tokens of a window, with those before its text."""
    place: Place
    """Of what it keeps of each survivor."""


def place_polish(
    schedule: Schedule, survivors: int, window: int, facts: Facts, processes: Sequence[Sequence[Phase]], room: Room
) -> Polish:
    """A polish, placed by what the others of its machine leave of `room` when it begins; `processes` are their phases
    but for it, first those of the one that keeps what it does."""
    places = ("device", "host") if facts.device == "cpu" else ("host",)
    held = [find_common(phases, place) for phases in processes for place in places]
    free = room.cpu - _add_up(itertools.chain(*held)) - _count_hidden(facts, schedule, window).bytes
    there = free if facts.device == "cpu" else room.gpu - _add_up(find_common(processes[0], "device"))
    wanted = survivors * count_state_bytes(facts.shape.item, "fp32")
    return Polish(schedule, survivors, window, place_state([(wanted, there)], free))


def add_polish(phases: Sequence[Phase], facts: Facts, polish: Polish) -> list[Phase]:
    """The phases of a process that does the work alone, and that of the polish before the last."""
    step, hidden = max(map(len, polish.schedule.steps)), _count_hidden(facts, polish.schedule, polish.window)
    common = find_common(phases, "device")
    there, here = _list_places(facts, polish)
    phase = Phase(
        name=POLISH,
        device=[*common, *_list_walk(facts, polish, step, 1), *there],
        host=[*find_common(phases, "host"), hidden, *here],
    )
    return [*phases[:-1], phase, phases[-1]]


def add_shared_polish(
    phases: Sequence[Phase], of_worker: Sequence[Phase], facts: Facts, polish: Polish, workers: int
) -> tuple[list[Phase], list[Phase]]:
    """As `add_polish`, of the process that workers work for, and of each of them."""
    step, hidden = max(map(len, polish.schedule.steps)), _count_hidden(facts, polish.schedule, polish.window)
    nodes = sum(len(list(list_nodes((0, step), span))) for span in share_out(step, workers))
    answers = multiply("gradients of all workers", (nodes, "sums"), (polish.survivors, "survivors"), (4, "bytes"))
    sent = Line(what="layers as they travel", how="all prunable layers, with their masks", bytes=facts.shape.packed)
    walk = [_count_marks(facts)] if step > 1 else _list_walk(facts, polish, step, 1)  # which cannot be shared
    common = find_common(phases, "device")
    there, here = _list_places(facts, polish)
    own = Phase(
        name=POLISH,
        device=[*common, *walk, *there],
        host=[*find_common(phases, "host"), hidden, answers, *here],
        store=[hidden, sent, answers],
    )
    theirs = Phase(
        name=POLISH,
        device=[*find_common(of_worker, "device"), *_list_walk(facts, polish, step, workers)],
        host=[*find_common(of_worker, "host"), sent],
    )
    return [*phases[:-1], own, phases[-1]], [*of_worker[:-1], theirs, of_worker[-1]]


def list_polish_disk(survivors: int, means: Means, windows: int, window: int, hidden: int, item: int) -> list[Line]:
    """What a polish on so many windows may write beside its checkpoint, of a model so wide with so many bytes a weight:
    what is kept of it, and for a moment what was kept before."""
    size = count_state_bytes(item, means)
    state = multiply("a polish under way", (2, "copies"), (survivors, "survivors"), (size, "bytes"))
    return [state, _describe_hidden(windows, window, hidden, item)]


def count_polish_disk(model: Any, layers: Sequence[Layer], settings: TeamSettings, lead: int, course: Course) -> int:
    """Bytes that a polish of the course may write beside its checkpoint, wherever its means come to lie."""
    if not course.polishes:
        return 0
    survivors = course.count_survivors(sum(layer.weight_OI.numel() for layer in layers))
    windows, embedding = course.count_fitted(settings), model.get_input_embeddings().weight
    shape = lead + settings.window, embedding.shape[1], embedding.element_size()
    return sum(line.bytes for line in list_polish_disk(survivors, "fp32", windows, *shape))


def _add_up(lines: Iterable[Line]) -> int:
    return sum(line.bytes for line in lines)


def _list_walk(facts: Facts, polish: Polish, step: int, workers: int) -> list[Line]:
    """What the way up and down with one window holds, and the gradients of a step of so many windows."""
    shape = facts.shape
    held = max(count_held((0, step), span) for span in share_out(step, workers))
    dense = (2, "copies"), (CHUNK, "tokens"), (shape.vocabulary, "words"), (4, "bytes")
    number = (shape.item, "bytes")
    return [
        *list_backward(shape, facts.counts),
        multiply("the dense model's", *dense),
        multiply(
            "inputs of all blocks, one window",
            (shape.blocks, "blocks"),
            (polish.window, "tokens"),
            (shape.hidden, "wide"),
            number,
        ),
        multiply(
            "inputs and output gradients of one block's layers",
            (polish.window, "tokens"),
            (shape.flow, "numbers"),
            number,
        ),
        multiply("gradients of all weights of one block", (shape.members, "weights"), (4, "bytes")),
        multiply(
            "gradients, sums over windows in the making", (held, "sums"), (polish.survivors, "survivors"), (4, "bytes")
        ),
        _count_marks(facts),
    ]


def _list_state(facts: Facts, polish: Polish) -> list[Line]:
    kept = (polish.survivors, "survivors")
    return [
        multiply("survivors before they are rounded", kept, (4, "bytes")),
        multiply("state of the optimiser", (2, "means"), kept, (MEAN_BYTES[polish.place.means], "bytes")),
        multiply("the best survivors so far", kept, (facts.shape.item, "bytes")),
    ]


def _list_places(facts: Facts, polish: Polish) -> tuple[list[Line], list[Line]]:
    """Lines of the device and of the CPU. What is kept on a GPU passes through CPU memory on its way to disk."""
    state = _list_state(facts, polish)
    if facts.device == "cpu":
        return state, []
    if polish.place.away:
        return [], state
    size = (count_state_bytes(facts.shape.item, polish.place.means), "bytes")
    return state, [multiply("its state on its way to disk", (polish.survivors, "survivors"), size)]


def _count_marks(facts: Facts) -> Line:
    return multiply("which weights survive", (facts.shape.prunable // facts.shape.item, "weights"), (1, "byte"))


def _count_hidden(facts: Facts, schedule: Schedule, window: int) -> Line:
    return _describe_hidden(len(schedule.windows), window, facts.shape.hidden, facts.shape.item)


def _describe_hidden(windows: int, window: int, hidden: int, item: int) -> Line:
    read = (windows, "windows"), (window, "tokens")
    return multiply("dense hidden states on calibration text", *read, (hidden, "wide"), (item, "bytes"))
