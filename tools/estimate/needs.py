"""What a run will need (memory, disk, time), said before anything is loaded: the model is built without its weights.

Where workers share the work, each of them has phases of its own, beside those of the process that they work for.

Memory and disk are sums of lines, each a product over the shapes of the model and the sizes of the texts. They are
bounds: no two layers are taken to share their input, though q, k and v do. On a GPU only tensors are counted, not what
CUDA itself takes. Time is that of the large products, at the speed of one such product, measured here.
"""

import math
import os
import re
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.base.errors import UserError, in_one_line
from tools.base.settings import TeamSettings, WorkbenchSettings, count_threads
from tools.measure.losses import PREFIX_SHARE
from tools.models.disk import Line, list_disk
from tools.models.formats import DTYPES
from tools.models.layers import Layer, find_blocks, find_layers, find_unprunable
from tools.models.load import ModelPlace, build_on_meta, locate_model, spread_blocks
from tools.models.readout import CHUNK
from tools.plans.layer_profile import LEVELS
from tools.statistics.shards import count_held, cut_shards, list_nodes, share_out

# How many tensors of a size are held at once, at most. Counted as live tensors on CPU, for layers of 1024 x 1024,
# 2048 x 512 and 512 x 2048, and for blocks of Llama, Qwen3, Gemma 3, GPT-2 and OPT, in fp32 and in bf16.
PRUNE_WEIGHTS = 10
"""fp32 copies of a layer's weights while it is pruned: the method `refit`; the others hold fewer."""
PRUNE_MATRICES = 5
"""fp32 matrices d_in x d_in while it is pruned, the second moment among them: SparseGPT; a refit holds two."""
LEVELS_WEIGHTS = 19
"""`PRUNE_WEIGHTS`, while the layer is pruned to all of `LEVELS` at once."""
CURVE_WEIGHTS = 5.25
"""`PRUNE_WEIGHTS`, while the levels of a KL curve are found; the quarter is the level of each weight, a byte."""
FORWARD = 1.5
"""What one block's forward holds, as a multiple of all that its layers read and write; GPT-2 1.4, the others 0.7."""
GRAPH = 3
"""The same for a forward with its graph and a backward; GPT-2 2.9, Gemma 3 2.2, Qwen3 1.8, the others 1.6."""
LOGITS = 5
"""fp32 copies of a chunk's logits: log p, log q, q, their difference and a product."""

REFIT_PRODUCTS = 13
"""Products (d_out x d_in) (d_in x d_in) of `kernels.refit_steps.refit_in_steps`."""

ASKED_FOR = "KL curves of a method, where a plan asks for them"
"""A phase that not every run has."""

IN_ORDER = "prune block by block, where a plan asks for it"
"""Another one."""

SPEED_SECONDS = 0.3
"""How long the speed of the device is measured, for each number format."""


QUESTION_TOKENS = 30
"""Tokens of a question with its answer: FreebaseQA's have 28 with SmolLM2's tokenizer."""


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


class Work(BaseModel):
    """Products that a step of a run multiplies out: the large ones, which take most of its time."""

    name: str
    how: str
    times: int = Field(description="How often, at most; 0 for what only some plans ask for.")
    flops: float = Field(description="Floating-point operations of one time, in `dtype`.")
    dtype: str
    share: float = Field(1.0, description="How much of it the busiest worker does; all of it where there are none.")


class Devices(BaseModel):
    """What the model may be put on: so many GPUs of one size, or the memory of a machine whose CPU is the device."""

    count: int = Field(ge=1)
    bytes: int = Field(gt=0, description="Memory of each.")


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
    dense: list[str] = Field(description="Weights inside the blocks that stay dense, such as fused experts.")
    phases: list[Phase] = Field(description="Of this process; with workers, of the one that they work for.")
    workers: int = Field(0, description="0: this process does the work.")
    threads: int = Field(description="CPU threads of each process that does the work.")
    of_worker: list[Phase] = Field([], description="Of each worker, as `phases`, at most; empty without any.")
    devices: Devices | None = Field(None, description="Null where it is not known what there is.")
    spread: list[Line] = Field([], description="What each GPU holds of a model that is laid over them; empty if not.")
    disk: list[Line]
    work: list[Work]
    speed: dict[str, float] = Field(description="Measured FLOP/s by dtype; empty where the device is not here.")

    @property
    def peak_device(self) -> Phase:
        """The phase that holds most on the device."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def peak_host(self) -> Phase:
        """The phase that holds most in CPU memory, beside the device."""
        return max(self.phases, key=lambda phase: phase.host_bytes)

    @property
    def peak(self) -> Phase:
        """The phase that holds most in both together."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def disk_bytes(self) -> int:
        """Sum of what is written."""
        return sum(line.bytes for line in self.disk)

    def seconds(self, work: Work) -> float | None:
        """Of one time, at the speed of one large product, of the busiest worker; None without the device."""
        return work.share * work.flops / self.speed[work.dtype] if work.dtype in self.speed else None

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


# --- the model without its weights ---------------------------------------------------------------------------------


def build_empty(settings: WorkbenchSettings) -> tuple[Any, int]:
    """(the model on torch's meta device, bytes that reading its file takes in CPU memory beside the model).

    Only the config is read: of a hub id, a directory, a .gguf file, a package or a .json file. Raises UserError in one
    line.
    """
    place = _locate_config(settings.model)
    try:
        model, stored = build_on_meta(place, settings)
    except Exception as error:  # every way a config can be broken has a class of error of its own
        raise UserError(f"model {settings.model!r} could not be built from its config: {in_one_line(error)}") from error
    if model.get_output_embeddings() is None:
        raise UserError("the model has no output head; a causal language model is needed")
    sizes = [parameter.numel() for parameter in model.parameters()]
    if place.gguf_file:
        return model, os.path.getsize(os.path.join(place.path, place.gguf_file)) + 4 * max(sizes)
    same = not isinstance(stored, torch.dtype) or stored == _dtype_of(settings)
    return model, 0 if same else stored.itemsize * sum(sizes)


def _dtype_of(settings: WorkbenchSettings) -> torch.dtype:
    dtype = getattr(torch, DTYPES[settings.dtype])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _locate_config(source: str) -> ModelPlace:
    """As `locate_model`, which a config on its own is not a model for."""
    if not source.endswith(".json"):
        return locate_model(source)
    path = os.path.expanduser(source)
    if not os.path.isfile(path):
        raise UserError(f"model config {source} does not exist; give the path of a config.json")
    return ModelPlace(path, None)


class _Shape(NamedTuple):
    """The figures that all formulas are made of."""

    weights: int
    """Bytes of the whole model."""
    prunable: int
    """Bytes of the prunable layers."""
    item: int
    """Bytes of one number of the model."""
    blocks: int
    hidden: int
    """Width of what blocks pass on."""
    vocabulary: int
    flow: int
    """Numbers a token that the layers of one block read and write, at most."""
    widest: int
    """Inputs of the layer that has most."""
    flow_layer: int
    """Numbers a token that one layer reads and writes, at most."""
    largest: int
    """Weights of the largest layer."""
    moments: int
    """Bytes of the second moments of one block, at most."""
    members: int
    """Weights of the layers of one block, at most."""
    packed: int
    """Bytes of the prunable layers with their masks, as they travel when they were pruned."""
    per_token: float
    """FLOPs a token of all blocks, with attention over half a window."""
    head: float
    """FLOPs a token of the output head."""


def _measure(model: Any, layers: list[Layer], settings: WorkbenchSettings) -> _Shape:
    config = model.config.get_text_config()
    shapes = {layer.name: tuple(layer.weight_OI.shape) for layer in layers}
    flows: dict[int, int] = {}
    moments: dict[int, int] = {}
    members: dict[int, int] = {}
    for layer in layers:
        members[layer.block] = members.get(layer.block, 0) + layer.weight_OI.numel()
        flows[layer.block] = flows.get(layer.block, 0) + sum(shapes[layer.name])
        moments[layer.block] = moments.get(layer.block, 0) + 4 * shapes[layer.name][1] ** 2
    others, read = 0.0, 0
    parameters = dict(model.named_parameters())
    for name in find_unprunable(model):
        shape = parameters[name].shape
        if len(shape) == 3:  # experts in one: a token passes through few of them
            share = getattr(config, "num_experts_per_tok", None) or shape[0]
            others += share * shape[1] * shape[2]
            read = max(read, share * (shape[1] + shape[2]))
        else:
            others += parameters[name].numel()
    blocks = len(find_blocks(model))
    heads = getattr(config, "num_attention_heads", None) or 0
    attention = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    head = model.get_output_embeddings().weight
    prunable = sum(layer.weight_OI.numel() for layer in layers)
    return _Shape(
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        prunable=sum(layer.weight_OI.nbytes for layer in layers),
        item=_dtype_of(settings).itemsize,
        blocks=blocks,
        hidden=config.hidden_size,
        vocabulary=head.shape[0],
        flow=max(flows.values()) + 2 * read,
        widest=max(shape[1] for shape in shapes.values()),
        flow_layer=max(sum(shape) for shape in shapes.values()),
        largest=max(math.prod(shape) for shape in shapes.values()),
        moments=max(moments.values()),
        members=max(members.values()),
        packed=sum(layer.weight_OI.nbytes + layer.weight_OI.numel() // 8 for layer in layers),
        per_token=2 * (prunable + others) + blocks * 2 * settings.window * attention,
        head=2 * head.numel(),
    )


# --- memory and disk -----------------------------------------------------------------------------------------------


def _multiply(what: str, *factors: tuple[float, str]) -> Line:
    """A line that is one product: its factors are (number, what is counted), the last one in bytes."""
    how = " × ".join(f"{number:,} {name}".rstrip() for number, name in factors)
    return Line(what=what, how=how, bytes=round(math.prod(number for number, _ in factors)))


class _Part(NamedTuple):
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


def _cut_parts(settings: WorkbenchSettings, workers: int) -> list[_Part]:
    """What each worker does of the calibration text, beside the busiest one's share of the validation text; all of it
    without any workers."""
    shards, count = cut_shards(settings.calibration_windows), max(workers, 1)
    validation = max(end - first for first, end in share_out(settings.validation_windows, count))
    parts = []
    for span in share_out(len(shards), count):
        windows = [window for shard in range(*span) for window in shards[shard]]
        nodes = list(list_nodes((0, len(shards)), span))
        parts.append(
            _Part(
                calibration=len(windows),
                gradient=sum(window < settings.gradient_windows for window in windows),
                validation=validation,
                sums=count_held((0, len(shards)), span),
                nodes=len(nodes),
                passed=2 if workers else 1,
                workers=workers,
            )
        )
    return parts


def _find_busiest(parts: Sequence[_Part]) -> _Part:
    return _Part(*(max(numbers) for numbers in zip(*parts, strict=True)))


def list_phases(
    shape: _Shape, settings: WorkbenchSettings, reading: int, device: str, part: _Part, weights: int
) -> list[Phase]:
    """What each phase holds in a process that works on `part`, with its arithmetic.

    `reading` is as `build_empty` gives it, `weights` what one device holds of the model, bytes.
    """
    state = (settings.window, "tokens"), (shape.hidden, "wide"), (shape.item, "bytes")
    flow = (settings.window, "tokens"), (shape.flow, "numbers into and out of layers"), (shape.item, "bytes")
    kept = _count_kept(shape, settings.validation_windows * settings.window * shape.hidden * shape.item)

    def states(what: str, *factors: tuple[float, str]) -> Line:
        return _multiply(what, *factors, *state)

    model = _describe_model(shape, weights)
    dense = Line(what="dense copy of the prunable layers", how="each is pruned from it", bytes=shape.prunable)
    always = [
        Line(what="Python, torch and transformers", how="measured in this process", bytes=_measure_process()),
        *([] if part.workers else [dense]),
        states("inputs of every few blocks, validation text", (kept, "blocks"), (part.validation, "windows")),
    ]
    logits = _multiply(
        "logits of a chunk", (LOGITS, "copies"), (CHUNK, "tokens"), (shape.vocabulary, "words"), (4, "bytes")
    )
    forward = _multiply("forward of one block", (FORWARD, "times"), *flow)
    evaluation = [model, forward, states("inputs of every few blocks, one window", (kept, "blocks")), logits]
    passed = ((part.passed, "blocks"),) if part.passed > 1 else ()
    backward = [
        model,
        _multiply("graph and backward of one block", (GRAPH, "times"), *flow),
        logits,
        _multiply("inputs and output gradients of one block's layers", *passed, (part.gradient, "windows"), *flow),
    ]
    if shape.item < 4:
        tokens = (part.gradient, "windows"), (settings.window, "tokens")
        backward.append(_multiply("those of one layer in fp32", *tokens, (shape.flow_layer, "numbers"), (4, "bytes")))
    walk = [*always, states("inputs of one block", (part.gradient, "windows"))]
    matrices = _multiply(
        "second moment and system of one layer",
        *((PRUNE_MATRICES, "matrices"), (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")),
    )

    def copies(what: str, count: float) -> Line:
        return _multiply(what, (count, "copies"), (shape.largest, "weights of the largest layer"), (4, "bytes"))

    statistics = [model, forward, _count_moments(shape, part.sums, "sums over shards in the making")]
    if shape.item < 4:
        tokens = (settings.window, "tokens"), (shape.widest, "inputs of the widest layer")
        statistics.append(_multiply("inputs of one layer in fp32", *tokens, (4, "bytes")))
    walked = states("inputs and outputs of one block", (2, "sets"), (part.calibration, "windows"))
    pruned = [copies("one layer being pruned", PRUNE_WEIGHTS), matrices]
    moved = [] if device == "cpu" else [Line(what="the model on its way", how="all parameters", bytes=shape.weights)]
    straight = settings.device == "spread"  # accelerate puts each weight where it belongs
    read = Line(what="its file as it is read", how="mapped, and converted in part", bytes=reading)
    answer = [] if device == "cpu" or not part.workers else [_count_moments(shape, part.nodes, "sums handed over")]
    reference = [states("dense hidden states as received", (settings.validation_windows, "windows"))]
    job = _list_job(shape) if part.workers else []
    return [
        Phase(
            name="load",
            device=[model],
            host=[always[0], *([read] if reading else []), *([] if straight else moved)],
        ),
        Phase(
            name="validate the dense model",
            device=evaluation,
            host=[*always, states("hidden states", (2, "copies"), (part.validation, "windows"))],
        ),
        Phase(name="profile, statistics", device=statistics, host=[*always, walked, *answer]),
        Phase(
            name="profile, gradients",
            device=[*backward, copies("levels of one layer's KL curve", CURVE_WEIGHTS)],
            host=[
                *walk,
                states("gradients passed on", (2, "losses"), (part.gradient, "windows")),
            ],
        ),
        Phase(
            name=ASKED_FOR,
            device=[*backward, copies(f"one layer pruned to {len(LEVELS)} levels", LEVELS_WEIGHTS), matrices],
            host=[
                *walk,
                states("gradients passed on", (part.gradient, "windows")),
                *([*job, _count_levels(shape)] if part.workers else []),
            ],
        ),
        Phase(name="prune", device=[model, *pruned], host=[*always, *job]),
        Phase(
            name=IN_ORDER,
            device=[model, *([] if part.workers else [_count_moments(shape, 1)]), *pruned],
            host=[*always, walked, *answer, *job],
        ),
        Phase(
            name="validate",
            device=evaluation,
            host=[
                *always,
                *([_count_changed(shape, "changed layers as received"), *reference] if part.workers else []),
                states("hidden states", (2 if part.workers else 3, "copies"), (part.validation, "windows")),
            ],
        ),
        Phase(name="export", device=[model], host=[*always, *([] if part.workers else moved)]),
    ]


def list_phases_beside(
    shape: _Shape, settings: WorkbenchSettings, reading: int, device: str, parts: Sequence[_Part]
) -> list[Phase]:
    """What each phase holds in the process that workers with these `parts` work for, and in their object store."""
    workers, nodes = parts[0].workers, sum(part.nodes for part in parts)
    model = _describe_model(shape, shape.weights)
    program = Line(what="Python, torch and transformers", how="measured in this process", bytes=_measure_process())
    always = [
        program,
        Line(what="dense copy of the prunable layers", how="each is pruned from it", bytes=shape.prunable),
    ]
    moved = [] if device == "cpu" else [Line(what="the model on its way", how="all parameters", bytes=shape.weights)]
    read = Line(what="its file as it is read", how="mapped, and converted in part", bytes=reading)

    def hidden(what: str, count: int) -> Line:
        states = (settings.validation_windows, "windows"), (settings.window, "tokens")
        copies = ((count, "copies"),) if count > 1 else ()
        return _multiply(what, *copies, *states, (shape.hidden, "wide"), (shape.item, "bytes"))

    matrix = (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")
    given = [
        Line(what="dense weights", how="the prunable layers, each put there once", bytes=shape.prunable),
        _multiply("second moments of layers to prune", (2 * workers, "layers"), *matrix),
    ]
    moment = _multiply("second moment of one layer", *matrix)
    levels, sums = _count_levels(shape), _count_moments(shape, nodes, "sums of all workers")
    two = _count_moments(shape, 2 * nodes, "sums of all workers for two blocks")
    results = _multiply("pruned layers of one block", (shape.members, "weights"), (shape.item + 1 / 8, "bytes"))
    return [
        Phase(name="load", device=[model], host=[program, *([read] if reading else []), *moved]),
        Phase(
            name="validate the dense model",
            device=[model],
            host=[*always, hidden("hidden states", 2)],
            store=[hidden("hidden states", 1)],
        ),
        Phase(name="profile, statistics", device=[model], host=[*always, sums], store=[two]),
        Phase(name="profile, gradients", device=[model], host=always),
        Phase(name=ASKED_FOR, device=[model, moment], host=always, store=[*given, levels]),
        Phase(name="prune", device=[model, moment], host=always, store=[*given, results]),
        Phase(name=IN_ORDER, device=[model, moment], host=[*always, sums], store=[*given, results, two]),
        Phase(
            name="validate",
            device=[model],
            host=[*always, hidden("hidden states", 1)],
            store=[given[0], _count_changed(shape, "pruned layers"), hidden("hidden states", 1)],
        ),
        Phase(name="export", device=[model], host=[*always, *moved], store=[given[0]]),
    ]


def _describe_model(shape: _Shape, weights: int) -> Line:
    if weights == shape.weights:
        return Line(what="the model", how="all parameters, each once", bytes=weights)
    return Line(what="the model's part on one GPU", how="the largest of these parts", bytes=weights)


def _count_moments(shape: _Shape, count: int, what: str = "") -> Line:
    how = f"{f'{count} {what}' if count > 1 else 'one sum'} × 4 bytes × inputs², over its layers"
    return Line(what="second moments of one block", how=how, bytes=count * shape.moments)


def _count_levels(shape: _Shape) -> Line:
    what = f"one block's layers at {len(LEVELS)} levels"
    return _multiply(what, (len(LEVELS), "levels"), (shape.members, "weights of its layers"), (4, "bytes"))


def _count_changed(shape: _Shape, what: str) -> Line:
    return Line(what=what, how="all prunable layers, with a bit for each weight's mask", bytes=shape.packed)


def _list_job(shape: _Shape) -> list[Line]:
    """What a worker holds of the layers that it prunes, which are those of one block at most."""
    matrix = (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")
    weights = (2, "copies"), (shape.members, "weights of one block"), (shape.item, "bytes")
    return [_multiply("layers as received and as pruned", *weights), _multiply("second moment as received", *matrix)]


def _count_kept(shape: _Shape, size: int) -> int:
    """Of how many blocks the validation text's inputs are kept, at `size` bytes each (`PrefixCache`)."""
    step = math.ceil(shape.blocks * size / max(int(PREFIX_SHARE * shape.weights), 1))
    return len(range(step, shape.blocks, step))


def _measure_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- time ----------------------------------------------------------------------------------------------------------


class _Shares(NamedTuple):
    """How much the busiest process does of the work on each text, and on the layers."""

    calibration: float
    gradient: float
    validation: float
    test: float
    layers: float
    questions: float


def _find_shares(settings: WorkbenchSettings, layers: list[Layer], part: _Part) -> _Shares:
    """Layers are taken one by one by whoever is free, so that nobody has more than an even share and one layer."""
    gradient, workers = min(settings.gradient_windows, settings.calibration_windows), max(part.workers, 1)
    costs = [math.prod(layer.weight_OI.shape) * layer.weight_OI.shape[1] for layer in layers]
    return _Shares(
        calibration=part.calibration / settings.calibration_windows,
        gradient=part.gradient / gradient,
        validation=part.validation / settings.validation_windows,
        test=math.ceil(settings.test_windows / workers) / settings.test_windows,
        layers=1 / workers + (1 - 1 / workers) * max(costs) / sum(costs),
        questions=1 / workers,
    )


def list_work(
    shape: _Shape,
    layers: list[Layer],
    settings: WorkbenchSettings,
    shares: _Shares,
    rounds: int,
    profiles: int,
    tests: int,
) -> list[Work]:
    """The plan of a run, step by step, with the products that each one multiplies out."""
    dtype, window = settings.dtype, settings.window
    gradient = min(settings.gradient_windows, settings.calibration_windows)
    tokens = {"calibration": window * settings.calibration_windows, "gradient": window * gradient}
    tokens |= {"validation": window * settings.validation_windows, "test": window * settings.test_windows}
    weights = sum(layer.weight_OI.numel() for layer in layers)
    squares = sum(layer.weight_OI.shape[1] ** 2 for layer in layers)
    prune = REFIT_PRODUCTS * sum(2.0 * layer.weight_OI.shape[0] * layer.weight_OI.shape[1] ** 2 for layer in layers)
    curves = 2.0 * len(LEVELS) * tokens["gradient"] * weights

    def text(split: str, count: int) -> str:
        return f"{count} windows of {window} tokens of {split} text"

    return [
        Work(
            name="validate the dense model",
            how=f"forward of {text('validation', settings.validation_windows)}",
            times=1,
            flops=tokens["validation"] * (shape.per_token + shape.head),
            dtype=dtype,
            share=shares.validation,
        ),
        Work(
            name="profile, statistics",
            how=f"forward of {text('calibration', settings.calibration_windows)}",
            times=profiles,
            flops=tokens["calibration"] * shape.per_token,
            dtype=dtype,
            share=shares.calibration,
        ),
        Work(
            name="profile, second moments",
            how=f"of what {len(layers)} layers read",
            times=1,
            flops=2.0 * tokens["calibration"] * squares,
            dtype="fp32",
            share=shares.calibration,
        ),
        Work(
            name="profile, gradients",
            how=f"forward again and two backwards of {gradient} of the windows",
            times=profiles,
            flops=3 * tokens["gradient"] * (shape.per_token + shape.head),
            dtype=dtype,
            share=shares.gradient,
        ),
        Work(
            name="profile, scores and KL curves",
            how=f"1 + {len(LEVELS)} products for each layer and window",
            times=profiles,
            flops=2.0 * tokens["gradient"] * weights + curves,
            dtype="fp32",
            share=shares.gradient,
        ),
        Work(
            name=ASKED_FOR,
            how=f"two forwards and a backward of {gradient} windows, and every layer pruned to {len(LEVELS)} levels",
            times=0,
            flops=3 * tokens["gradient"] * shape.per_token + curves + len(LEVELS) / 3 * prune,
            dtype="fp32",
            share=max(shares.gradient, shares.layers),
        ),
        Work(
            name="prune",
            how=f"{len(layers)} layers by the method refit, {REFIT_PRODUCTS} products each; other methods cost less",
            times=rounds,
            flops=prune,
            dtype="fp32",
            share=shares.layers,
        ),
        Work(
            name="validate",
            how=f"forward of {text('validation', settings.validation_windows)}, the output head twice",
            times=rounds,
            flops=tokens["validation"] * (shape.per_token + 2 * shape.head),
            dtype=dtype,
            share=shares.validation,
        ),
        *_list_questions(shape, settings, 1 + rounds + tests, shares.questions),
        Work(
            name="test",
            how=f"forward of {text('test', settings.test_windows)}",
            times=tests,
            flops=tokens["test"] * (shape.per_token + shape.head),
            dtype=dtype,
            share=shares.test,
        ),
    ]


def _list_questions(shape: _Shape, settings: WorkbenchSettings, times: int, share: float) -> list[Work]:
    if not settings.questions:
        return []
    return [
        Work(
            name="ask questions",
            how=f"forward of {settings.question_pairs} questions of about {QUESTION_TOKENS} tokens with their answers",
            times=times,
            flops=settings.question_pairs * QUESTION_TOKENS * shape.per_token,
            dtype=settings.dtype,
            share=share,
        )
    ]


def measure_speed(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of one product of square matrices, repeated for `SPEED_SECONDS`, on so many threads of a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _repeat_product(device, dtype)
    finally:
        torch.set_num_threads(before)


def _repeat_product(device: torch.device, dtype: torch.dtype) -> float:
    side = 4096 if device.type == "cuda" else 512  # a GPU needs a large one to be busy
    left = torch.ones(side, side, dtype=dtype, device=device)
    right, done = torch.ones_like(left), 0
    _run_product(left, right)  # the first one also loads the library
    began = time.perf_counter()
    while (seconds := time.perf_counter() - began) < SPEED_SECONDS:
        _run_product(left, right)
        done += 1
    return done * 2.0 * side**3 / seconds


def _run_product(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.mm(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)


# --- all of it -----------------------------------------------------------------------------------------------------


def read_devices(text: str) -> Devices:
    """`"80"`, or `"8x80"` for eight of them, in GB. Raises UserError for another form."""
    form = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\d{1,6}(?:\.\d+)?)", text, re.ASCII)
    if form is None or float(form[2]) == 0:
        raise UserError(f"device memory {text!r} is neither GB, such as 80, nor COUNTxGB, such as 8x80")
    return Devices(count=int(form[1] or 1), bytes=round(float(form[2]) * 1e9))


def find_devices(device: str) -> Devices | None:
    """The GPUs that are here, as alike as the smallest, or this machine's memory; None where there is no GPU."""
    if device == "cpu":
        return Devices(count=1, bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return Devices(count=len(sizes), bytes=min(sizes)) if sizes else None


def estimate(
    settings: TeamSettings,
    *,
    target: float,
    rounds: int,
    profiles: int = 1,
    tests: int = 0,
    devices: Devices | None = None,
) -> Estimate:
    """What a run needs at most that prunes to `target` in `rounds` plans, profiles `profiles` times, and measures
    `tests` models on the test text.

    `devices` are those of another machine; without them, those that are here. Reads the model's config and measures the
    device's speed for a moment. Raises UserError in one line.
    """
    workers = _count_workers(settings)
    model, reading = build_empty(settings)
    layers = find_layers(model)
    shape = _measure(model, layers, settings)
    here = torch.cuda.is_available()
    device = "cpu" if settings.device == "cpu" or (settings.device == "auto" and not here) else "cuda"
    devices = devices or find_devices(device)
    spread = _lay_out(model, devices) if settings.device == "spread" else []
    parts = _cut_parts(settings, workers)
    busiest = _find_busiest(parts)
    held = max((line.bytes for line in spread), default=shape.weights)
    phases = list_phases(shape, settings, reading, device, busiest, held)
    weights = sum(layer.weight_OI.numel() for layer in layers)
    work = list_work(shape, layers, settings, _find_shares(settings, layers, busiest), rounds, profiles, tests)
    formats = dict.fromkeys(step.dtype for step in work) if device == "cpu" or here else {}
    threads = count_threads(settings) if workers else torch.get_num_threads()
    crowded = 1.0 if device == "cuda" else max(1.0, workers * threads / (os.cpu_count() or 1))
    return Estimate(
        model=settings.model,
        dtype=settings.dtype,
        device=device,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=shape.blocks,
        layers=len(layers),
        weights=weights,
        zeros=round(target * weights),
        dense=find_unprunable(model),
        phases=list_phases_beside(shape, settings, reading, device, parts) if workers else phases,
        workers=workers,
        threads=threads,
        of_worker=phases if workers else [],
        devices=devices,
        spread=spread,
        disk=list_disk(model, layers, settings),
        work=work,
        speed={
            name: measure_speed(torch.device(device), getattr(torch, DTYPES[name]), threads) / crowded
            for name in formats
        },
    )


def _lay_out(model: Any, devices: Devices | None) -> list[Line]:
    """What each GPU holds of a model that is laid over them. Raises UserError when there are none, or too few."""
    if devices is None:
        raise UserError("torch sees no GPU here to spread the model over; plan for others with --device-memory 8x80")
    places = spread_blocks(model, dict.fromkeys(range(devices.count), devices.bytes))
    sizes = dict.fromkeys(range(devices.count), 0)
    for name, parameter in model.named_parameters():
        sizes[next(place for part, place in places.items() if not part or f"{name}.".startswith(f"{part}."))] += (
            parameter.nbytes
        )
    blocks = find_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    lines = []
    for place, size in sizes.items():
        own = [part for part, where in places.items() if where == place]
        count = sum(any(f"{prefix}.{b}.".startswith(f"{part}.") for part in own if part) for b in range(len(blocks)))
        others = [part for part in own if not f"{part}.".startswith(f"{prefix}.")]
        how = f"{len(blocks) if '' in own else count} blocks{''.join(f', {part}' for part in others if part)}"
        lines.append(Line(what=f"GPU {place}", how=how, bytes=size))
    return lines


def _count_workers(settings: TeamSettings) -> int:
    """0 where there are none. Raises UserError for those of a cluster, which is not asked."""
    if settings.workers and not settings.workers.isdigit():
        raise UserError(
            f"how many workers {settings.workers} has is not asked here; give their number, such as --workers 8"
        )
    return int(settings.workers or 0)


def print_estimate(found: Estimate, console: Console) -> None:
    """Every line of the arithmetic, then what it comes to; plain lines where there is no terminal."""
    if found.spread:
        own = [(line.what, line.how, _size(line.bytes)) for line in found.spread]
        _print_table(console, f"the model over {len(own)} GPUs", own)
    for title, rows in _list_memory(found, found.phases, "this process, " if found.workers else ""):
        _print_table(console, title, rows)
    if found.workers:
        for title, rows in _list_memory(found, found.of_worker, "each worker, "):
            _print_table(console, title, rows)
    disk = [(line.what, line.how, _size(line.bytes)) for line in found.disk]
    _print_table(console, f"disk: {_size(found.disk_bytes)}", disk)
    work = [
        (
            *(step.name, step.how, f"{step.times} ×" if step.times else "", _flops(step.flops)),
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
        return [(line.what, line.how, where, _size(line.bytes)) for where, line in lines]

    load, *others = phases
    common = [item for item in place(others[0]) if all(item in place(phase) for phase in others)]
    yield f"{whose}memory, in all phases but load", show(common)
    for phase in phases:
        size = _size(phase.bytes)
        if found.device == "cuda":
            which = "one" if found.spread else "the"
            size = f"{_size(phase.device_bytes)} on {which} GPU, {_size(phase.host_bytes)} in CPU memory"
        if phase.store:
            size += f", {_size(phase.store_bytes)} in the object store"
        lines = place(phase)
        named = show(lines if phase is load else [item for item in lines if item not in common])
        yield f"{whose}{phase.name}: {size}", named


def summarise(found: Estimate) -> list[str]:
    """What is to be pruned, the peaks, and whether there is room for them, in a few lines."""
    lines = [
        f"{found.model}, {found.dtype} on {found.device}: {found.parameters:,} parameters, {found.blocks} blocks",
        f"prunable: {found.layers} layers, {found.weights:,} weights; {found.zeros:,} zeros at the end",
    ]
    if found.dense:
        lines.append(f"stay dense: {len(found.dense)} weights such as {found.dense[0]}, no plain linear layers")
    lines += _list_peaks(found)
    lines.append(f"disk: {_size(found.disk_bytes)}")
    total = sum(work.times * work.flops for work in found.work)
    if not found.speed:
        alone = sum(work.times * work.flops * work.share for work in found.work)
        share = f", {_flops(alone)} of it by the busiest worker" if found.workers else ""
        return [*lines, f"work: up to {_flops(total)}{share}; no time can be predicted, as torch sees no GPU here"]
    speeds = ", ".join(f"{_flops(speed)}/s in {name}" for name, speed in found.speed.items())
    seconds = sum(work.times * (found.seconds(work) or 0.0) for work in found.work)
    whose = f"of one of {found.workers} workers" if found.workers else "of one product"
    return [*lines, f"work: up to {_flops(total)}, {_duration(seconds)} at the speed {whose} here, {speeds}"]


def _list_peaks(found: Estimate) -> list[str]:
    if found.workers:
        lines = _list_peaks_of(found.of_worker, found.device, f"each of {found.workers} workers: ")
        lines += _list_peaks_of(found.phases, found.device, "this process: ")
        store = max(found.phases, key=lambda phase: phase.store_bytes)
        lines.append(f"peak of Ray's object store: {_size(store.store_bytes)} ({store.name})")
        most = max(found.phases, key=found.count_host)
        kind = "memory" if found.device == "cpu" else "memory of the CPU"
        lines.append(f"peak {kind} of a machine with all of them: {_size(found.count_host(most))} ({most.name})")
    else:
        lines = _list_peaks_of(found.phases, found.device, "", "each" if found.spread else "the")
    return [*lines, _judge_room(found)]


def _list_peaks_of(phases: Sequence[Phase], device: str, whose: str, which: str = "the") -> list[str]:
    if device == "cpu":
        most = max(phases, key=lambda phase: phase.bytes)
        return [f"{whose}peak memory: {_size(most.bytes)} ({most.name})"]
    on_device = max(phases, key=lambda phase: phase.device_bytes)
    on_host = max(phases, key=lambda phase: phase.host_bytes)
    return [
        f"{whose}peak memory of {which} GPU: {_size(on_device.device_bytes)} ({on_device.name})",
        f"{whose}peak memory of the CPU: {_size(on_host.host_bytes)} ({on_host.name})",
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
        return f"{short}fits {place} of {_size(room)}: {_size(needed)} at most ({phase}{beside})"
    verdict = f"{short}does not fit {place} of {_size(room)}: {_size(needed)} ({phase}{beside})"
    if found.device == "cpu":
        return f"{verdict}; {'fewer --workers' if found.workers else 'fewer or shorter windows'} need less"
    if found.spread:
        return f"{verdict}; fewer or shorter windows need less, or more GPUs hold less each"
    weights = found.phases[0].device_bytes
    working = needed - weights * (2 if found.workers else 1)
    fewer = "" if weights + working > room and weights >= room else "fewer or shorter windows need less; "
    least = f", at least {math.ceil(weights / (room - working))} of these" if working < room else ""
    alone = " without --workers" if found.workers else ""
    advice = f"{fewer}--device spread{alone} lays its blocks over several GPUs{least}"
    return f"{verdict}, {_size(weights)} of it the model; {advice}"


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
    return "" if seconds is None else _duration(seconds)


def _size(count: float) -> str:
    """2100000000 → 2.1 GB"""
    return _scale(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "bytes")


def _flops(count: float) -> str:
    return _scale(count, (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)), "FLOP")


def _scale(count: float, units: tuple[tuple[str, float], ...], least: str) -> str:
    name, unit = next(((name, unit) for name, unit in units if count >= unit), (least, 1.0))
    return f"{count / unit:.1f} {name}" if unit > 1 else f"{count:.0f} {name}"


def _duration(seconds: float) -> str:
    """4000 → 1.1 hours"""
    for name, unit in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} seconds"
