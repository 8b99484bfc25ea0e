"""What `--dry-run` says: whether a run fits, its memory by phase, its disk, and its time from one block really run."""

import copy
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from billhook_kernels.methods import LayerStatistics
from tools.base.errors import ImpossiblePlan, UserError, in_one_line
from tools.base.memory import count_free
from tools.base.settings import TeamSettings, count_beside, count_threads
from tools.base.words import show_seconds, show_size
from tools.estimate.empty import Empty, build_empty, list_conversion, read_source
from tools.estimate.memory import Course, Devices, Place, find_place, measure_process
from tools.measure.continuations import PROMPTS, count_continued
from tools.models.artifacts import bound_mask, bound_values
from tools.models.disk import CutSizes, DiskPlan, Line, plan_disk
from tools.models.layers import Layer, find_blocks
from tools.models.readout import CHUNK, compute_hidden
from tools.plans.costs import schedule_polish
from tools.plans.layer_profile import LayerProfile
from tools.plans.pattern import count_pattern_zeros
from tools.plans.recipe import Recipe
from tools.polish.gradients import count_state_bytes
from tools.statistics.shards import count_waiting
from tools.statistics.table import list_shapes, prune_layer
from tools.surgery.parts import find_parts
from tools.surgery.share import find_target
from tools.texts.written import BATCH, list_written

WORDS = 2**15
"""Rows of the output head that are really there while one block is timed, at most."""

SMALL = 512
"""Inputs or outputs, whichever are more, of a layer that is pruned to see how long that takes."""


def estimate(
    settings: TeamSettings,
    course: Course,
    *,
    target: float,
    devices: Devices | None = None,
    directory: Path = Path(),
    refuse: Callable[[list[LayerProfile]], None] = lambda layers: None,
) -> list[str]:
    """What a run needs that prunes to `target`, or cuts, and takes this `course`: some lines, the verdict first.

    `devices` are those of another machine, whose disk has room for all unless the settings say how much. Reads the
    model's config, and runs one block where the device is here. `refuse` is told of the layers, of which sizes alone
    are known. Raises UserError in one line, as for a target that cannot be met.
    """
    workers = count_beside(settings)
    if settings.workers and not workers:
        raise UserError(
            f"how many workers {settings.workers} has is not asked here; give their number, such as --workers 8"
        )
    empty, process = build_empty(settings), measure_process()
    if not course.cut:
        refuse(list_shapes(empty.layers))
    sizes = count_cut(empty.model, empty.layers, course)
    if course.polish_tokens:
        _check_polish(settings, course)
    place = find_place(empty, settings, course, devices, process)
    room = settings.disk * 1e9 or (math.inf if devices else _count_free_disk(directory))
    plan, beside = _plan_disk(empty, settings, course, place, sizes, room)
    written = plan.bytes + sum(line.bytes for line in beside)
    lines = [
        _judge(place, workers, written, room),
        f"model: {settings.model}, {settings.dtype} on {place.device}{', streamed' if place.streamed else ''}: "
        f"{sum(p.numel() for p in empty.model.parameters()):,} parameters, {len(find_blocks(empty.model))} blocks",
        f"prunable: {len(empty.layers)} layers, {empty.weights:,} weights, {empty.reach.of_blocks:.1%} of the blocks'; "
        + (f"{course.cut.size:.1%} of the bytes stay" if course.cut else f"{round(target * empty.weights):,} zeros"),
        *_tell_memory(place, workers),
        f"disk: {show_size(written)}: "
        + ", ".join(f"{show_size(line.bytes)} {line.what}" for line in [*plan.lines, *beside] if line.bytes),
    ]
    if plan.at_once:
        lines.append(f"second moments: those of {plan.at_once} blocks at a time fit the disk; rounds collect them anew")
    return [*lines, _tell_time(empty, settings, course, place)]


def _judge(place: Place, workers: int, written: int, room: float) -> str:
    needed, phase = place.count_needed(workers)
    disk = "" if written <= room else f"; the disk has {show_size(room)} of the {show_size(written)} that are written"
    if place.devices is None:
        return (
            f"needs a GPU of {show_size(needed)} ({phase}){disk}; torch sees none here: "
            "say what there is with --device-memory, such as 80 or 8x80"
        )
    what = "memory" if place.device == "cpu" else "each GPU" if place.spread or workers else "the GPU"
    there = f"{show_size(needed)} of {what} ({phase}), and there are {show_size(place.devices.bytes)}"
    if place.device == "cuda" and workers > place.devices.number:
        return f"does not fit: {workers} workers need as many GPUs, and there are {place.devices.number}{disk}"
    if needed > place.devices.bytes:
        aim = "" if place.streamed else ", or --device stream"
        return (
            f"does not fit: needs {there}; give fewer or shorter windows{', fewer workers' * (workers > 0)}{aim}{disk}"
        )
    return f"{'fits' if not disk else 'does not fit'}: needs {there}{disk}"


def _tell_memory(place: Place, workers: int) -> list[str]:
    def tell(phases: list[Any]) -> str:
        if place.device == "cpu":
            return ", ".join(f"{show_size(phase.device + phase.host)} {phase.name}" for phase in phases)
        return ", ".join(f"{show_size(phase.device)} {phase.name}" for phase in phases)

    where = "memory" if place.device == "cpu" else "GPU memory"
    lines = [f"{where}: {tell(place.phases)}"]
    if workers:
        lines.append(f"{where} of each of {workers} workers: {tell(place.of_worker)}")
    if place.device == "cuda":
        lines.append(f"CPU memory: {show_size(place.count_host(workers))} at most")
    return lines


# --- disk ------------------------------------------------------------------------------------------------------------


def count_cut(model: Any, layers: list[Layer], course: Course) -> CutSizes | None:
    """What a run that takes parts away keeps on disk, at most; None for another. Raises UserError where it cannot."""
    if course.cut is None:
        return None
    target = find_target(model, course.cut.size, course.cut.align)
    shape, item = target.shape, layers[0].weight_OI.element_size()
    parts = [part for kind in shape.kinds for part in find_parts(model, kind)]
    masks = sum(bound_mask(x.weight_OI) + bound_values(x.weight_OI, 0) for x in layers)
    fitted = sum(part.output.weight_OI.nbytes for part in parts)
    biases = sum(layer.bias_O.nbytes for layer in layers if layer.bias_O is not None)
    last = shape.neurons.options[-2:]  # a cut comes as near to its target as whole steps of neurons allow
    left = shape.blocks * (target.share * shape.block_cost - (last[-1] - last[0]) * shape.neurons.cost)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return CutSizes(masks + fitted + biases, 8 * sum(part.units for part in parts), whole - round(item * left))


def count_polish_disk(model: Any, layers: list[Layer], settings: TeamSettings, lead: int, course: Course) -> int:
    """Bytes that a polish may write beside its checkpoint: twice what it keeps of each survivor, and what the dense
    model's head reads of the windows that it is fitted to."""
    if not course.polish_tokens:
        return 0
    weights = sum(layer.weight_OI.numel() for layer in layers)
    survivors, embedding = weights - math.floor(course.polished_at * weights), model.get_input_embeddings().weight
    texts = 2 if settings.mixes_questions else 1
    hidden: int = (
        settings.count_fitted() * texts * (lead + settings.window) * embedding.shape[1] * embedding.element_size()
    )
    return 2 * survivors * count_state_bytes(embedding.element_size(), "fp32") + hidden


def _plan_disk(
    empty: Empty, settings: TeamSettings, course: Course, place: Place, sizes: CutSizes | None, room: float
) -> tuple[DiskPlan, list[Line]]:
    """(what the run writes, second moments as there is room for; what a polish and a conversion write beside it)."""
    polish = count_polish_disk(empty.model, empty.layers, settings, empty.lead, course)
    beside = [Line(what="a polish under way", how="", bytes=polish)] if polish else []
    streams = place.streamed is not None
    plan = plan_disk(
        *(empty.model, empty.layers, settings, room - polish, empty.lead),
        streamed=streams,
        in_source=read_source(settings, empty.layers) if streams else set(),
        waiting=count_waiting(settings.count_all("calibration")),
        checkpoints=course.checkpoints,
        sizes=sizes,
    )
    return plan, [*beside, *(list_conversion(settings, empty.bytes) if streams else [])]


def _count_free_disk(directory: Path) -> int:
    """Bytes, where a directory is or will be."""
    present = next(path for path in [directory.resolve(), *directory.resolve().parents] if path.exists())
    return shutil.disk_usage(present).free


def _check_polish(settings: TeamSettings, course: Course) -> None:
    try:
        schedule_polish(settings.count_fitted(), settings.window, course.polish_tokens, settings.seed)
    except ImpossiblePlan as error:
        raise UserError(str(error)) from error


# --- time ------------------------------------------------------------------------------------------------------------


class _Seconds(NamedTuple):
    """Of one window of text, through all blocks but for the output head."""

    forward: float
    backward: float
    moments: float
    head: float
    word: float
    """A forward of one token."""
    words: float
    """A token of each of as many documents as are written at once, with the output head."""


def _tell_time(empty: Empty, settings: TeamSettings, course: Course, place: Place) -> str:
    """A line: the time of the profile, of what is pruned and of what is measured."""
    device, workers = torch.device(place.device), max(count_beside(settings), 1)
    blocks = find_blocks(empty.model)
    one = 4 * max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    if place.device == "cuda" and not torch.cuda.is_available():
        return "time: not foretold, as torch sees no GPU here"
    if one > (torch.cuda.mem_get_info()[0] if place.device == "cuda" else count_free()):
        return "time: not foretold, as one block does not fit the memory that is free here"
    before = torch.get_num_threads()
    torch.set_num_threads(count_threads(settings) if settings.workers else before)
    try:
        at = _time_block(empty.model, len(blocks), empty.lead + settings.window, device)
        pruned = {name: _time_pruning(recipe, empty.layers, device) for name, recipe in _name(course).items()}
    except Exception as error:  # there may be too little memory, or no code for an operation
        return f"time: not foretold: {in_one_line(error, 100)}"
    finally:
        torch.set_num_threads(before)
    calibration, gradient = settings.count_all("calibration"), settings.back_propagated
    profile = calibration * (at.forward + at.moments) + gradient * (2 * at.forward + 2 * at.backward + 2 * at.head)
    rounds = course.trials * settings.count_all("validation") * (at.forward + 2 * at.head)
    for recipe in course.recipes:
        rounds += pruned[recipe.mask_label + recipe.pattern]
        if recipe.in_order:
            rounds += calibration * (2 * at.forward + at.moments * recipe.changes_survivors)
        if recipe.needs_curves:
            rounds += 2 * gradient * (at.forward + at.backward + at.head)
    if course.cut:
        rounds += course.cut.rounds * calibration * (4 * at.forward + at.moments)
    if course.polish_tokens:
        rounds += course.polish_tokens / settings.window * (3 * at.forward + at.backward + 4 * at.head)
    end = course.tests * settings.count_all("test") * (at.forward + at.head)
    end += 2 * count_continued(streamed=place.streamed is not None) * len(PROMPTS) ** 0.5 * at.word
    parts = {"profile": profile / workers, "rounds": rounds / workers, "end": end}
    if written := list_written(settings):  # of each text as many documents at once as one batch has, word by word
        parts = {"texts": sum(-(-n // BATCH) for n in written.values()) * settings.window * at.words, **parts}
    told = ", ".join(f"{name} {show_seconds(seconds)}" for name, seconds in parts.items())
    disk = ", beside what the disk takes" if place.streamed else ""
    return f"time: about {show_seconds(sum(parts.values()))} ({told}), as one block takes here{disk}"


def _name(course: Course) -> dict[str, Recipe]:
    return {recipe.mask_label + recipe.pattern: recipe for recipe in course.recipes}


def _time_block(model: Any, count: int, tokens: int, device: torch.device) -> _Seconds:
    """Really run the largest block of a model on the meta device, with random weights, and the output head."""
    sample = copy.deepcopy(model)
    config, blocks = sample.config.get_text_config(), find_blocks(sample)
    chosen = max(range(len(blocks)), key=lambda index: sum(p.numel() for p in blocks[index].parameters()))
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers, blocks._modules = 1, {"0": blocks[chosen]}
    with suppress(AttributeError, TypeError):  # some configs make them of other fields
        config.layer_types = types[chosen : chosen + 1]  # type: ignore[index]
    head, embedding = sample.get_output_embeddings(), sample.get_input_embeddings()
    words = head.weight.shape[0] / min(head.weight.shape[0], WORDS)
    for module in (head, embedding):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter[:WORDS], requires_grad=False))
    embedding.padding_idx = None
    for module in sample.modules():
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None:
                    made = torch.zeros(value.shape, dtype=value.dtype, device=device)
                    made = made.normal_(std=0.02) if made.is_floating_point() else made
                    kept[name] = nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made
    sample.eval()
    ids_BT = torch.zeros(1, tokens, dtype=torch.long, device=device)
    hidden_BTD = compute_hidden(sample, ids_BT).detach()
    inputs = Counter(parameter.shape[-1] for parameter in blocks.parameters() if parameter.ndim == 2)

    def back() -> None:
        embedding.weight.requires_grad_(True)
        compute_hidden(sample, ids_BT).float().sum().backward()
        embedding.weight.requires_grad_(False)

    @torch.no_grad()
    def sum_up() -> None:
        for width, times in inputs.items():
            x_TI = torch.ones(tokens, width, device=device)
            for _ in range(times):
                x_TI.T @ x_TI

    with torch.no_grad():
        forward = _time(device, lambda: compute_hidden(sample, ids_BT))
        word = _time(device, lambda: compute_hidden(sample, ids_BT[:, :1]))
        documents = _time(device, lambda: compute_hidden(sample, ids_BT[:, :1].expand(BATCH, 1)))
        drawn = _time(device, lambda: head(hidden_BTD[:, :1].expand(BATCH, -1, -1)))
        logits = _time(device, lambda: head(hidden_BTD[:, :CHUNK]).float().log_softmax(-1))
    both, chunks = _time(device, back), tokens / min(tokens, CHUNK)
    return _Seconds(
        count * forward,
        count * max(both - forward, 0.0),
        count * _time(device, sum_up),
        words * chunks * logits,
        count * word,
        count * documents + words * drawn,
    )


def _time_pruning(recipe: Recipe, layers: list[Layer], device: torch.device) -> float:
    """Seconds for all layers: of each form a smaller one is pruned, and that takes as outputs × inputs² more."""
    seconds = 0.0
    for (outputs, inputs), times in Counter(tuple(layer.weight_OI.shape) for layer in layers).items():
        ratio, step = max(outputs, inputs, SMALL) / SMALL, 16 * (recipe.group[1] if recipe.group else 1)
        rows, columns = max(1, round(outputs / ratio)), max(step, round(inputs / ratio / step) * step)
        rows, columns = (rows, columns) if ratio > 1 else (outputs, inputs)
        weight_OI, x_TI = torch.randn(rows, columns, device=device), torch.randn(2 * columns, columns, device=device)
        moment_II = x_TI.T @ x_TI / len(x_TI)
        statistics = LayerStatistics(moment_II.diagonal().clone(), torch.ones(rows, device=device), moment_II)
        size = weight_OI.numel()
        zeros = count_pattern_zeros(size, recipe.group) if recipe.group else round(0.45 * size)
        took = _time(device, lambda: prune_layer(recipe, weight_OI, statistics, zeros))  # noqa: B023
        growth = outputs * inputs / size * (inputs / columns if recipe.changes_survivors else 1)
        seconds += times * took * growth
    return seconds


def _time(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds of the second of two runs: the first one also loads libraries."""
    for _ in range(2):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - began
