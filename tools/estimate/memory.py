"""What is held in memory in each phase of a run: sums of lines, each a product over shapes and sizes, or counted.

What a forward, a backward, the output head and a method of pruning hold was counted while they ran
(`tools.estimate.block`, `tools.estimate.pruning`). The lines are bounds: no two layers are taken to share their input,
though q, k and v do; gate and up of a fused expert are known to. On a GPU only tensors are counted, not what CUDA
itself takes.
"""

import math
from collections.abc import Sequence

from tools.base.settings import WorkbenchSettings
from tools.estimate.phases import (
    ASKED_FOR,
    IN_ORDER,
    Facts,
    Part,
    Phase,
    count_levels,
    count_moments,
    describe_loading,
    describe_writing,
    list_both_held,
    list_other_moment,
)
from tools.estimate.shape import Shape, count_once, list_backward, multiply, name_chunk
from tools.measure.losses import PREFIX_SHARE
from tools.models.disk import Line
from tools.models.streamed import StreamSizes
from tools.plans.layer_profile import LEVELS
from tools.texts.written import list_written


def list_phases(
    facts: Facts,
    settings: WorkbenchSettings,
    part: Part,
    weights: int,
    *,
    streamed: StreamSizes | None = None,
    anew: bool = False,
) -> list[Phase]:
    """What each phase holds in a process that works on `part`, with its arithmetic.

    `weights` is what one device holds of the model, bytes, which of one that is `streamed` are not looked at. `anew`
    says whether second moments are not kept.
    """
    shape, counts, held = facts.shape, facts.counts, facts.held
    state = (settings.window, "tokens"), (shape.hidden, "wide"), (shape.item, "bytes")
    flow = (settings.window, "tokens"), (shape.flow, "numbers into and out of layers"), (shape.item, "bytes")
    validated = settings.count_all("validation") * settings.window * shape.hidden * shape.item
    kept = 0 if streamed else _count_kept(shape, validated)

    def states(what: str, *factors: tuple[float, str]) -> Line:
        return multiply(what, *factors, *state)

    def passed_on(what: str, *factors: tuple[float, str]) -> list[Line]:
        """What windows pass on from one block to the next; nothing where that lies on disk (`hold_states`)."""
        line = states(what, *factors)
        return [] if streamed and line.bytes > facts.states else [line]

    other = [] if part.workers else list_other_moment(shape, settings)

    def pruned(what: str, size: int) -> list[Line]:
        moment = multiply("its second moment", (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes"))
        return [count_once(what, size, "a smaller layer of the same form"), moment, *other]

    model, program, read, moved = describe_loading(facts, weights, streamed)
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

    backward = [model, *list_both_held(facts, streamed), *list_backward(shape, counts)]
    flowing = [] if away else list_flow()
    making = min(part.sums, part.nodes + 1) if streamed else part.sums  # others wait on disk
    sums = count_moments(shape, making, "sums over shards in the making")
    statistics = [model, forward, sums]
    if shape.item < 4:
        tokens = (settings.window, "tokens"), (shape.widest, "inputs of the widest layer")
        statistics.append(multiply("inputs of one layer in fp32", *tokens, (4, "bytes")))

    def walked(*texts: tuple[int, str]) -> list[Line]:
        return passed_on("inputs of one block", *texts, (part.calibration, "windows"))

    def hidden(dense: bool) -> list[Line]:
        """What is held of the validation text, of the dense model or of another beside it, which workers are given."""
        windows = (part.validation, "windows")
        if streamed is None:
            return [states("hidden states", (2 if dense or part.workers else 3, "copies"), windows)]
        beside = dense or not part.workers
        kept = [states("hidden states of the dense model", windows)] if beside else []
        return [*passed_on("states between two blocks", windows), *kept]

    collected = [sums] if anew else []  # whenever layers are pruned
    layer = pruned("one layer being pruned", held.pruned)
    curve = count_once("levels of one layer's KL curve", held.curve, "a smaller layer of the same form")
    of_block = [count_moments(shape, 1)]
    levels = [*list_flow_at_hand(*mixed), *pruned(f"one layer pruned to {len(LEVELS)} levels", held.levels)]
    before = [*collected, *([] if away else list_flow(*mixed))]  # what flowed back through the last block is still held
    straight = settings.device == "spread"  # accelerate puts each weight where it belongs
    handed = facts.device != "cpu" and part.workers
    answer = [count_moments(shape, part.nodes, "sums handed over")] if handed else []
    passing = [*walked(*mixed), *answer] if anew else []
    reference = [states("dense hidden states as received", (settings.count_all("validation"), "windows"))]
    job = _list_job(shape) if part.workers else []
    return [
        Phase(name="load", device=[model], host=[program, *read, *([] if straight else moved)]),
        *([describe_writing(facts, settings, model)] if list_written(settings) and not part.workers else []),
        Phase(
            name="validate the dense model",
            device=evaluation,
            host=[*always, *hidden(dense=True)],
        ),
        Phase(name="profile, statistics", device=statistics, host=[*always, *walked(), *answer]),
        Phase(
            name="profile, gradients",
            # curves are measured once a block's graph is gone
            device=max([*backward, *flowing], [model, *list_flow_at_hand(), curve], key=_add_up),
            host=[
                *always,
                *(list_flow() if away else []),
                states("inputs of one block", (part.gradient, "windows")),
                states("gradients passed on", (2, "losses"), (part.gradient, "windows")),
            ],
        ),
        Phase(
            name=ASKED_FOR,
            device=[*backward, *collected, *levels]
            if part.workers
            else max([*backward, *before], [model, *levels], key=_add_up),
            host=[
                *always,
                *passing,
                *(list_flow(*mixed) if away else []),
                states("inputs of one block", *mixed, (part.gradient, "windows")),
                states("gradients passed on", *mixed, (part.gradient, "windows")),
                *([*job, count_levels(shape)] if part.workers else []),
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
            device=[model, *([] if part.workers or away else of_block), *layer],
            host=[*always, *walked(*mixed), *(of_block if away and not part.workers else []), *answer, *job],
        ),
        Phase(
            name="validate",
            device=evaluation,
            host=[
                *always,
                *([*job[:1], *reference] if part.workers else []),
                *hidden(dense=False),
            ],
        ),
        Phase(name="export", device=[model], host=[*always, *([] if part.workers else moved)]),
    ]


def _add_up(lines: Sequence[Line]) -> int:
    return sum(line.bytes for line in lines)


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
