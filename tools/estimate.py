"""What a run will need (memory, disk, time), said before anything is loaded: the model is built without its weights.

Memory and disk are sums of lines, each a product over the shapes of the model and the sizes of the texts. They are
bounds: no two layers are taken to share their input, though q, k and v do. On a GPU only tensors are counted, not what
CUDA itself takes. Time is that of the large products, at the speed of one such product, measured here.
"""

import math
import os
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.curves import LEVELS
from tools.errors import UserError
from tools.layers import Layer, find_blocks, find_layers, find_unprunable
from tools.readout import CHUNK
from tools.settings import WorkbenchSettings
from tools.sources import DTYPES, ModelPlace, locate_model

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
PREFIX_SHARE = 0.5
"""Of the model's own size: what block inputs that validations start from may take (`tools.workbench.PREFIX_SHARE`)."""

ASKED_FOR = "KL curves of a method, where a plan asks for them"
"""The one phase that not every run has."""

SPEED_SECONDS = 0.3
"""How long the speed of the device is measured, for each number format."""


QUESTION_TOKENS = 30
"""Tokens of a question with its answer: FreebaseQA's have 28 with SmolLM2's tokenizer."""


class Line(BaseModel):
    """One item of a sum."""

    what: str
    how: str = Field(description="The formula, in words and figures.")
    bytes: int


class Phase(BaseModel):
    """What is held at once in one phase of a run, at most."""

    name: str
    device: list[Line] = Field(description="On the device that the model runs on.")
    host: list[Line] = Field(description="In CPU memory; where the device is the CPU, beside the lines of the device.")

    @property
    def device_bytes(self) -> int:
        """Sum of the lines of the device."""
        return sum(line.bytes for line in self.device)

    @property
    def host_bytes(self) -> int:
        """Sum of the lines of the CPU."""
        return sum(line.bytes for line in self.host)

    @property
    def bytes(self) -> int:
        """Both sums together, as on a machine whose device is the CPU."""
        return self.device_bytes + self.host_bytes


class Work(BaseModel):
    """Products that a step of a run multiplies out: the large ones, which take most of its time."""

    name: str
    how: str
    times: int = Field(description="How often, at most; 0 for what only some plans ask for.")
    flops: float = Field(description="Floating-point operations of one time, in `dtype`.")
    dtype: str


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
    phases: list[Phase]
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
        """Of one time, at the speed of one large product; None without the device."""
        return work.flops / self.speed[work.dtype] if work.dtype in self.speed else None


# --- the model without its weights ---------------------------------------------------------------------------------


def build_empty(settings: WorkbenchSettings) -> tuple[Any, int]:
    """(the model on torch's meta device, bytes that reading its file takes in CPU memory beside the model).

    Only the config is read: of a hub id, a directory, a .gguf file, a package or a .json file. Raises UserError in one
    line.
    """
    import transformers

    place = _locate_config(settings.model)
    trust: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    file = {"gguf_file": place.gguf_file} if place.gguf_file else {}
    try:
        config = transformers.AutoConfig.from_pretrained(place.path, **file, **trust)
        stored = config.get_text_config().dtype
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=_dtype_of(settings), **trust)
    except Exception as error:  # every way a config can be broken has a class of error of its own
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"model {settings.model!r} could not be built from its config: {line}") from error
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
    per_token: float
    """FLOPs a token of all blocks, with attention over half a window."""
    head: float
    """FLOPs a token of the output head."""


def _measure(model: Any, layers: list[Layer], settings: WorkbenchSettings) -> _Shape:
    config = model.config.get_text_config()
    shapes = {layer.name: tuple(layer.weight_OI.shape) for layer in layers}
    flows: dict[int, int] = {}
    moments: dict[int, int] = {}
    for layer in layers:
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
        per_token=2 * (prunable + others) + blocks * 2 * settings.window * attention,
        head=2 * head.numel(),
    )


# --- memory and disk -----------------------------------------------------------------------------------------------


def _multiply(what: str, *factors: tuple[float, str]) -> Line:
    """A line that is one product: its factors are (number, what is counted), the last one in bytes."""
    how = " × ".join(f"{number:,} {name}".rstrip() for number, name in factors)
    return Line(what=what, how=how, bytes=round(math.prod(number for number, _ in factors)))


def list_phases(shape: _Shape, settings: WorkbenchSettings, reading: int, device: str) -> list[Phase]:
    """What each phase of a run holds, with its arithmetic; `reading` as `build_empty` gives it."""
    calibration, validation = settings.calibration_windows, settings.validation_windows
    gradient = min(settings.gradient_windows, calibration)
    state = (settings.window, "tokens"), (shape.hidden, "wide"), (shape.item, "bytes")
    flow = (settings.window, "tokens"), (shape.flow, "numbers into and out of layers"), (shape.item, "bytes")
    kept = _count_kept(shape, validation * settings.window * shape.hidden * shape.item)

    def states(what: str, *factors: tuple[float, str]) -> Line:
        return _multiply(what, *factors, *state)

    model = Line(what="the model", how="all parameters, each once", bytes=shape.weights)
    always = [
        Line(what="Python, torch and transformers", how="measured in this process", bytes=_measure_process()),
        Line(what="dense copy of the prunable layers", how="each is pruned from it", bytes=shape.prunable),
        states("inputs of every few blocks, validation text", (kept, "blocks"), (validation, "windows")),
    ]
    logits = _multiply(
        "logits of a chunk", (LOGITS, "copies"), (CHUNK, "tokens"), (shape.vocabulary, "words"), (4, "bytes")
    )
    forward = _multiply("forward of one block", (FORWARD, "times"), *flow)
    evaluation = [model, forward, states("inputs of every few blocks, one window", (kept, "blocks")), logits]
    backward = [
        model,
        _multiply("graph and backward of one block", (GRAPH, "times"), *flow),
        logits,
        _multiply("inputs and output gradients of one block's layers", (gradient, "windows"), *flow),
    ]
    if shape.item < 4:
        tokens = (gradient, "windows"), (settings.window, "tokens")
        backward.append(_multiply("those of one layer in fp32", *tokens, (shape.flow_layer, "numbers"), (4, "bytes")))
    walk = [*always, states("inputs of one block", (gradient, "windows"))]
    matrices = _multiply(
        "second moment and system of one layer",
        *((PRUNE_MATRICES, "matrices"), (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")),
    )

    def copies(what: str, count: float) -> Line:
        return _multiply(what, (count, "copies"), (shape.largest, "weights of the largest layer"), (4, "bytes"))

    squares = "4 bytes × inputs², over its layers"
    statistics = [model, forward, Line(what="second moments of one block", how=squares, bytes=shape.moments)]
    if shape.item < 4:
        tokens = (settings.window, "tokens"), (shape.widest, "inputs of the widest layer")
        statistics.append(_multiply("inputs of one layer in fp32", *tokens, (4, "bytes")))
    moved = [] if device == "cpu" else [Line(what="the model on its way", how="all parameters", bytes=shape.weights)]
    read = Line(what="its file as it is read", how="mapped, and converted in part", bytes=reading)
    return [
        Phase(name="load", device=[model], host=[always[0], *([read] if reading else []), *moved]),
        Phase(
            name="validate the dense model",
            device=evaluation,
            host=[*always, states("hidden states", (2, "copies"), (validation, "windows"))],
        ),
        Phase(
            name="profile, statistics",
            device=statistics,
            host=[
                *always,
                states("inputs and outputs of one block", (2, "sets"), (calibration, "windows")),
            ],
        ),
        Phase(
            name="profile, gradients",
            device=[*backward, copies("levels of one layer's KL curve", CURVE_WEIGHTS)],
            host=[
                *walk,
                states("gradients passed on", (2, "losses"), (gradient, "windows")),
            ],
        ),
        Phase(
            name=ASKED_FOR,
            device=[*backward, copies(f"one layer pruned to {len(LEVELS)} levels", LEVELS_WEIGHTS), matrices],
            host=[
                *walk,
                states("gradients passed on", (gradient, "windows")),
            ],
        ),
        Phase(name="prune", device=[model, copies("one layer being pruned", PRUNE_WEIGHTS), matrices], host=always),
        Phase(
            name="validate",
            device=evaluation,
            host=[*always, states("hidden states", (3, "copies"), (validation, "windows"))],
        ),
        Phase(name="export", device=[model], host=[*always, *moved]),
    ]


def _count_kept(shape: _Shape, size: int) -> int:
    """Of how many blocks the validation text's inputs are kept, at `size` bytes each (`tools.losses.PrefixCache`)."""
    step = math.ceil(shape.blocks * size / max(int(PREFIX_SHARE * shape.weights), 1))
    return len(range(step, shape.blocks, step))


def _measure_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def list_disk(model: Any, layers: list[Layer], settings: WorkbenchSettings) -> list[Line]:
    """What a run may write at most: moments, block inputs, three checkpoints and the exported model."""
    blocks, embedding = len(find_blocks(model)), model.get_input_embeddings().weight
    windows = min(settings.gradient_windows, settings.calibration_windows)
    weights = sum(layer.weight_OI.nbytes for layer in layers)
    return [
        Line(
            what="second moments",
            how=f"4 bytes × inputs², over {len(layers)} layers",
            bytes=sum(4 * layer.weight_OI.shape[1] ** 2 for layer in layers),
        ),
        _multiply(
            "inputs of all blocks, while the model is profiled",
            *((blocks, "blocks"), (windows, "windows"), (settings.window, "tokens")),
            *((embedding.shape[1], "wide"), (embedding.element_size(), "bytes")),
        ),
        Line(what="checkpoints", how="3 × the prunable layers", bytes=3 * weights),
        Line(what="the exported model", how="all parameters", bytes=sum(p.nbytes for p in model.parameters())),
    ]


# --- time ----------------------------------------------------------------------------------------------------------


def list_work(
    shape: _Shape, layers: list[Layer], settings: WorkbenchSettings, rounds: int, profiles: int, tests: int
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
        ),
        Work(
            name="profile, statistics",
            how=f"forward of {text('calibration', settings.calibration_windows)}",
            times=profiles,
            flops=tokens["calibration"] * shape.per_token,
            dtype=dtype,
        ),
        Work(
            name="profile, second moments",
            how=f"of what {len(layers)} layers read",
            times=profiles,
            flops=2.0 * tokens["calibration"] * squares,
            dtype="fp32",
        ),
        Work(
            name="profile, gradients",
            how=f"forward again and two backwards of {gradient} of the windows",
            times=profiles,
            flops=3 * tokens["gradient"] * (shape.per_token + shape.head),
            dtype=dtype,
        ),
        Work(
            name="profile, scores and KL curves",
            how=f"1 + {len(LEVELS)} products for each layer and window",
            times=profiles,
            flops=2.0 * tokens["gradient"] * weights + curves,
            dtype="fp32",
        ),
        Work(
            name=ASKED_FOR,
            how=f"two forwards and a backward of {gradient} windows, and every layer pruned to {len(LEVELS)} levels",
            times=0,
            flops=3 * tokens["gradient"] * shape.per_token + curves + len(LEVELS) / 3 * prune,
            dtype="fp32",
        ),
        Work(
            name="prune",
            how=f"{len(layers)} layers by the method refit, {REFIT_PRODUCTS} products each; other methods cost less",
            times=rounds,
            flops=prune,
            dtype="fp32",
        ),
        Work(
            name="validate",
            how=f"forward of {text('validation', settings.validation_windows)}, the output head twice",
            times=rounds,
            flops=tokens["validation"] * (shape.per_token + 2 * shape.head),
            dtype=dtype,
        ),
        *_list_questions(shape, settings, 1 + rounds + tests),
        Work(
            name="test",
            how=f"forward of {text('test', settings.test_windows)}",
            times=tests,
            flops=tokens["test"] * (shape.per_token + shape.head),
            dtype=dtype,
        ),
    ]


def _list_questions(shape: _Shape, settings: WorkbenchSettings, times: int) -> list[Work]:
    if not settings.questions:
        return []
    return [
        Work(
            name="ask questions",
            how=f"forward of {settings.question_pairs} questions of about {QUESTION_TOKENS} tokens with their answers",
            times=times,
            flops=settings.question_pairs * QUESTION_TOKENS * shape.per_token,
            dtype=settings.dtype,
        )
    ]


def measure_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one product of square matrices, repeated for `SPEED_SECONDS`."""
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


def estimate(settings: WorkbenchSettings, *, target: float, rounds: int, profiles: int = 1, tests: int = 0) -> Estimate:
    """What a run needs at most that prunes to `target` in `rounds` plans, profiles `profiles` times, and measures
    `tests` models on the test text.

    Reads the model's config and measures the device's speed for a moment. Raises UserError in one line.
    """
    model, reading = build_empty(settings)
    layers = find_layers(model)
    shape = _measure(model, layers, settings)
    here = torch.cuda.is_available()
    device = "cpu" if settings.device == "cpu" or (settings.device == "auto" and not here) else "cuda"
    weights = sum(layer.weight_OI.numel() for layer in layers)
    work = list_work(shape, layers, settings, rounds, profiles, tests)
    formats = dict.fromkeys(step.dtype for step in work) if device == "cpu" or here else {}
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
        phases=list_phases(shape, settings, reading, device),
        disk=list_disk(model, layers, settings),
        work=work,
        speed={name: measure_speed(torch.device(device), getattr(torch, DTYPES[name])) for name in formats},
    )


def print_estimate(found: Estimate, console: Console) -> None:
    """Every line of the arithmetic, then what it comes to; plain lines where there is no terminal."""
    for title, rows in _list_memory(found):
        _print_table(console, title, rows)
    disk = [(line.what, line.how, _size(line.bytes)) for line in found.disk]
    _print_table(console, f"disk: {_size(found.disk_bytes)}", disk)
    work = [
        (step.name, step.how, f"{step.times} ×" if step.times else "", _flops(step.flops), _time_of(found, step))
        for step in found.work
    ]
    _print_table(console, "work, one time each", work)
    console.print()
    for text in summarise(found):
        console.print(Text(text), soft_wrap=True)


def _list_memory(found: Estimate) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows) of each phase; what all of them hold once the model is loaded comes first, and only once."""

    def place(phase: Phase) -> list[tuple[str, Line]]:
        gpu, cpu = ("", "") if found.device == "cpu" else ("GPU", "CPU")
        return [*((gpu, line) for line in phase.device), *((cpu, line) for line in phase.host)]

    def show(lines: list[tuple[str, Line]]) -> list[tuple[str, ...]]:
        return [(line.what, line.how, where, _size(line.bytes)) for where, line in lines]

    load, *others = found.phases
    common = [item for item in place(others[0]) if all(item in place(phase) for phase in others)]
    yield "memory, in all phases but load", show(common)
    for phase in found.phases:
        size = _size(phase.bytes)
        if found.device == "cuda":
            size = f"{_size(phase.device_bytes)} on the GPU, {_size(phase.host_bytes)} in CPU memory"
        lines = place(phase)
        yield f"{phase.name}: {size}", show(lines if phase is load else [item for item in lines if item not in common])


def summarise(found: Estimate) -> list[str]:
    """What is to be pruned, and the peaks, in a few lines."""
    lines = [
        f"{found.model}, {found.dtype} on {found.device}: {found.parameters:,} parameters, {found.blocks} blocks",
        f"prunable: {found.layers} layers, {found.weights:,} weights; {found.zeros:,} zeros at the end",
    ]
    if found.dense:
        lines.append(f"stay dense: {len(found.dense)} weights such as {found.dense[0]}, no plain linear layers")
    if found.device == "cpu":
        lines.append(f"peak memory: {_size(found.peak.bytes)} ({found.peak.name})")
    else:
        lines.append(f"peak memory of the GPU: {_size(found.peak_device.device_bytes)} ({found.peak_device.name})")
        lines.append(f"peak memory of the CPU: {_size(found.peak_host.host_bytes)} ({found.peak_host.name})")
    lines.append(f"disk: {_size(found.disk_bytes)}")
    total = sum(work.times * work.flops for work in found.work)
    if not found.speed:
        return [*lines, f"work: up to {_flops(total)}; no time can be predicted, as torch sees no GPU here"]
    speeds = ", ".join(f"{_flops(speed)}/s in {name}" for name, speed in found.speed.items())
    seconds = sum(work.times * (found.seconds(work) or 0.0) for work in found.work)
    return [*lines, f"work: up to {_flops(total)}, {_duration(seconds)} at the speed of one product here, {speeds}"]


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
