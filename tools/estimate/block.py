"""One block of each kind that a model has, without its weights, or with random ones to be really run.

What is counted or timed on them is Billhook's own code (`tools.models.blocks`, `tools.statistics.walks`), on a model in
which every kind of block stands once, below a last one that passes its input on: what flows back through that one is
the work of the output head alone.

Shape suffixes: T tokens, D hidden width, I input features, O output features.
"""

import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from transformers import masking_utils

from tools.base.errors import UserError, in_one_line
from tools.base.settings import WorkbenchSettings
from tools.estimate.meter import Meter
from tools.models.blocks import Blocks, take_hidden
from tools.models.disk import Line
from tools.models.experts import is_fused
from tools.models.formats import DTYPES
from tools.models.hub import check_in_reach
from tools.models.layers import Layer, find_blocks, find_layers
from tools.models.load import ModelPlace, build_on_meta, load_tokenizer, locate_model
from tools.models.readout import CHUNK, compute_hidden, hidden_gradients, measure_losses
from tools.models.source import list_in_source, map_source
from tools.models.streamed import find_conversion
from tools.texts.windows import count_lead

WORDS = 2**15
"""Rows of the output head that are really there, at most: what it takes grows with them in proportion."""


def build_empty(settings: WorkbenchSettings) -> tuple[Any, int]:
    """(the model on torch's meta device, bytes that reading its file takes in CPU memory beside the model).

    Only the config is read: of a hub id, a directory, a .gguf file, a package or a .json file. Raises UserError in one
    line.
    """
    place = _locate_config(settings.model)
    check_in_reach(settings.model)
    try:
        model, stored = build_on_meta(place, settings)
    except Exception as error:  # every way a config can be broken has a class of error of its own
        raise UserError(f"model {settings.model!r} could not be built from its config: {in_one_line(error)}") from error
    if model.get_output_embeddings() is None:
        raise UserError("the model has no output head; a causal language model is needed")
    sizes = [parameter.numel() for parameter in model.parameters()]
    if place.gguf_file:
        return model, os.path.getsize(os.path.join(place.path, place.gguf_file)) + 4 * max(sizes)
    same = not isinstance(stored, torch.dtype) or stored == dtype_of(settings)
    return model, 0 if same else stored.itemsize * sum(sizes)


def read_lead(settings: WorkbenchSettings) -> int:
    """Tokens of each window that are no text; none where there is a config alone, without a tokenizer."""
    try:
        return 0 if settings.model.endswith(".json") else count_lead(settings, load_tokenizer(settings))
    except Exception:  # every way a tokenizer can be missing has a class of error of its own
        return 0


def read_source(settings: WorkbenchSettings, layers: Sequence[Layer]) -> set[str]:
    """Names of the layers whose dense weights a model that is streamed has in its own files, by their headers.

    None where these are not here: those of a hub id that were not downloaded, or of a .gguf file that was not converted
    yet, or of a config alone.
    """
    path, gguf_file = _locate_config(settings.model)
    if not gguf_file:
        return list_in_source(layers, map_source(path))
    made = find_conversion(Path(path, gguf_file), settings.dtype)
    return list_in_source(layers, map_source(str(made))) if made else set()


def list_conversion(settings: WorkbenchSettings, model: Any) -> list[Line]:
    """What a model that is streamed out of a .gguf file takes once, beside the run's directory: that as safetensors."""
    path, gguf_file = _locate_config(settings.model)
    if not gguf_file or find_conversion(Path(path, gguf_file), settings.dtype):
        return []
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype_of(settings).itemsize
    how = "all parameters, once, in the user's cache (~/.cache/billhook)"
    return [Line(what="the .gguf file, converted", how=how, bytes=size)]


def dtype_of(settings: WorkbenchSettings) -> torch.dtype:
    """The number format that the model runs in."""
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


# --- a model of few blocks -----------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A model in which every kind of block stands once."""

    model: Any
    blocks: Blocks
    """One of each kind, and the one above that passes its input on."""
    layers: list[Layer]
    counts: list[int]
    """How many blocks of the whole model are of each kind."""
    words: float
    """How many times as many rows the output head of the whole model has."""

    def members(self, kind: int) -> list[Layer]:
        """The layers of the block of a kind."""
        return [layer for layer in self.layers if layer.block == kind]


def count_kinds(model: Any) -> list[tuple[int, int]]:
    """(first block, how many there are) of each kind of block: those alike in their class and in all shapes."""
    kinds: dict[Any, list[int]] = {}
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    for index, block in enumerate(find_blocks(model)):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        key = type(block).__name__, shapes, types[index] if index < len(types) else None
        kinds.setdefault(key, []).append(index)
    return [(members[0], len(members)) for members in kinds.values()]


def build_sample(model: Any, device: torch.device | str) -> Sample:
    """Such a model with random weights, from one on the meta device, which stays as it is.

    Inside `FakeTensorMode` the weights take no memory.
    """
    with unset_fake_temporarily():  # what is on the meta device has no memory either, and is no fake
        model = copy.deepcopy(model)
        counts = _keep_one_of_each(model)
        words = _cut_words(model)
    _fill(model, torch.device(device))
    model = model.eval().requires_grad_(False)
    return Sample(model, Blocks(model), find_layers(model), counts, words)


def _keep_one_of_each(model: Any) -> list[int]:
    config, blocks, kinds = model.config.get_text_config(), find_blocks(model), count_kinds(model)
    if types := getattr(config, "layer_types", None):
        picked = [types[first] for first, _ in kinds]
        with suppress(AttributeError):  # some configs make them of other fields
            config.layer_types = [*picked, picked[-1]]
    config.num_hidden_layers = len(kinds) + 1
    chosen = [blocks[first] for first, _ in kinds]
    blocks._modules = {str(index): block for index, block in enumerate([*chosen, _make_tail(chosen[-1])])}
    return [count for _, count in kinds]


def _cut_words(model: Any) -> float:
    """Leave the first WORDS rows of embeddings and output head; how many times as many there were."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    rows = head.weight.shape[0]
    for module in (head, embedding):
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                setattr(module, name, nn.Parameter(parameter.detach()[:WORDS], requires_grad=False))
    embedding.padding_idx = None
    return float(rows / head.weight.shape[0])


def _make_tail(block: nn.Module) -> nn.Module:
    """A block that looks like another one, has no layers, and hands its input on."""
    tail = copy.copy(block)
    for name, value in vars(block).items():
        if isinstance(value, dict):  # its parts and its hooks are not the other one's
            vars(tail)[name] = type(value)()
    tail._parameters["place"] = nn.Parameter(torch.empty(1, device="meta"))  # says which device it is on
    lengths: list[int | None] = [None]

    def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
        lengths[0] = None if isinstance(output, Tensor) else len(output)

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        """In the form in which the block below returned its output."""
        hidden_BTD = take_hidden(args, kwargs)
        return hidden_BTD if lengths[0] is None else (hidden_BTD, *[None] * (lengths[0] - 1))

    block.register_forward_hook(see)
    tail.forward = pass_on
    return tail


def _fill(model: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer values of an ordinary size; what was one tensor stays one."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_make_values(parameter, device))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _make_values(buffer, device)


def _make_values(like: Tensor, device: torch.device) -> Tensor:
    values = torch.empty(like.shape, dtype=like.dtype, device=device)
    if not like.is_floating_point():
        return values.zero_()
    return values.normal_(std=like.shape[-1] ** -0.5) if like.ndim > 1 else values.fill_(1.0)


# --- what is counted on it -----------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What one window of text takes, from a run of the code itself; bytes beside what was there before."""

    forward_bytes: int
    """The forward of one block: the largest kind's."""
    graph_bytes: int
    """Its forward with a graph, and a backward."""
    loss_bytes: int
    """The losses of one chunk of tokens, beside the dense model's."""
    readout_bytes: int
    """The gradients that a chunk begins with."""
    forward: float
    """FLOPs of all blocks, forward."""
    backward: float
    """FLOPs of all blocks, backward to what they read."""
    head: float
    """FLOPs of the output head, forward."""
    routed: float = 1.0
    """Share of the tokens that each expert is sent, on average; 1 without fused experts."""


def count_block(model: Any, window: int, lead: int = 0) -> Counts:
    """Run one block of each kind of a model on the meta device, and the output head, on tensors that take no memory.

    A window is so many tokens of text behind `lead` others, which the head makes nothing of.
    Where torch does not know the shapes that an operation gives in the model's number format, it is counted in bf16.
    Raises UserError for a model that can be counted in neither.
    """
    try:
        return _count(model, window, lead)
    except Exception as error:  # whatever an operation raises that knows no tensors without memory
        problem = in_one_line(error, 200)
    try:
        counts = _count(copy.deepcopy(model).to(torch.bfloat16), window, lead)
    except Exception as error:
        raise UserError(f"one block of the model could not be run on shapes alone: {problem}") from error
    ratio = next(model.parameters()).itemsize / 2
    return counts._replace(
        forward_bytes=round(counts.forward_bytes * ratio), graph_bytes=round(counts.graph_bytes * ratio)
    )


def _count(model: Any, window: int, lead: int) -> Counts:
    with _no_word_of_torch(), FakeTensorMode(), _as_one_text():
        sample = build_sample(model, "cpu")
        ids_T = torch.zeros(lead + window, dtype=torch.long)
        x_BTD = sample.blocks.embed(ids_T).clone()
        forwards = [_count_forward(sample, ids_T, kind, x_BTD) for kind in range(len(sample.counts))]
        graphs = [_count_graph(sample, ids_T, kind, x_BTD) for kind in range(len(sample.counts))]
        loss, readout = _count_head(sample, ids_T[lead:][:CHUNK])
        routed = _find_routed(sample, ids_T)
    forward, both = (
        float(sum(count * meter.flops for count, meter in zip(sample.counts, meters, strict=True)))
        for meters in (forwards, graphs)
    )
    chunks = math.ceil(window / CHUNK)
    return Counts(
        forward_bytes=max(meter.peak for meter in forwards),
        graph_bytes=max(meter.peak for meter in graphs),
        loss_bytes=round(sample.words * loss.peak),
        readout_bytes=round(sample.words * readout.peak),
        forward=forward,
        backward=both - forward,
        head=sample.words * loss.flops / 2 * chunks,  # the model's logits, and the dense model's
        routed=routed,
    )


@contextmanager
def _no_word_of_torch() -> Iterator[None]:
    """torch logs a traceback of every operation that it has no shapes for."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _as_one_text() -> Iterator[None]:
    """transformers looks in position ids for several texts in one window, and masks them where it cannot see any."""
    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    setattr(masking_utils, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


def _count_forward(sample: Sample, ids_T: Tensor, kind: int, x_BTD: Tensor) -> Meter:
    meter = Meter()
    with torch.no_grad(), meter:
        sample.blocks.run(ids_T, kind, x_BTD)
    return meter


def _count_graph(sample: Sample, ids_T: Tensor, kind: int, x_BTD: Tensor) -> Meter:
    given_BTD = x_BTD.clone().requires_grad_()
    meter = Meter()
    with meter:
        y_BTD = sample.blocks.run(ids_T, kind, given_BTD)
        torch.autograd.grad(y_BTD, given_BTD, torch.ones_like(y_BTD))
    return meter


def _count_head(sample: Sample, ids_T: Tensor) -> tuple[Meter, Meter]:
    """Of one chunk: its losses beside the dense model's, and the gradients of what the head reads."""
    loss, readout = Meter(), Meter()
    with only_head(sample, ids_T) as hidden_TD, loss, suppress(DataDependentOutputException):
        measure_losses(sample.model, ids_T, hidden_TD)  # at its end makes numbers of two sums, which have no value here
    with readout:
        hidden_gradients(sample.model, ids_T, hidden_TD, torch.Generator())
    return loss, readout


def _find_routed(sample: Sample, ids_T: Tensor) -> float:
    shares = [1.0]

    def see(module: Any, inputs: Any, _output: Any) -> None:
        config = sample.model.config.get_text_config()
        chosen = inputs[1].shape[-1] if len(inputs) > 1 else getattr(config, "num_experts_per_tok", module.num_experts)
        shares.append(chosen / module.num_experts)

    hooks = [module.register_forward_hook(see) for module in sample.model.modules() if is_fused(module)]
    with torch.no_grad():
        compute_hidden(sample.model, ids_T[None])
    for hook in hooks:
        hook.remove()
    return shares[-1]


@contextmanager
def only_head(sample: Sample, ids_T: Tensor) -> Iterator[Tensor]:
    """Inside, a forward of the model runs no block; what its output head reads of these tokens, (T, D)."""
    last = len(sample.counts)
    with sample.blocks.only(last, last + 1, ids_T, sample.blocks.embed(ids_T)):
        with torch.no_grad():
            hidden_TD = compute_hidden(sample.model, ids_T[None])[0]
        yield hidden_TD
