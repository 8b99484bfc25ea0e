"""A pruned model on disk and in memory with its layers packed: smaller than the dense one, and faster to decode with.

`kernels/FORMAT.md` describes the file. Nothing of it is believed: every tensor has its hash, and what a kernel will
read is counted again; `packing.py` writes it. In memory are the packed layers and the other weights; more tokens at
once than `MOST_PACKED_ROWS` need a few MB beside, where a layer is unpacked a few rows at a time.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook_kernels.dispatch import explain_torch
from billhook_kernels.native import WORD
from billhook_kernels.packed import (
    PADDING,
    PackedLinear,
    PackedWeight,
    check_packed,
    settle_layers,
    unpack_rows,
)
from tools.base.errors import DamagedArtifact, UserError, in_one_line
from tools.base.words import show_size
from tools.models.experts import ExpertLinear, PackedExpert, list_stacked, replace_experts
from tools.models.formats import DTYPES, PACKED_FILE
from tools.models.layers import Layer, find_layers
from tools.models.mapped import view_bytes

KEY = "billhook"
"""Of the JSON in the file's metadata."""

Sha256 = Field(pattern="^[0-9a-f]{64}$")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LayerRecord(_Record):
    """A packed layer."""

    shape: tuple[int, int] = Field(description="Outputs and inputs.")
    transposed: bool = Field(description="Whether the dense model stores it as inputs x outputs (Conv1D).")
    nonzeros: int = Field(ge=0, description="Values, without the padding behind them.")
    mask_sha256: str = Sha256
    values_sha256: str = Sha256


class TensorRecord(_Record):
    """Any other tensor of the model's state."""

    shape: list[int]
    dtype: str
    sha256: str = Sha256


class Contents(_Record):
    """The JSON in the file's metadata."""

    format: Literal["billhook-packed"] = "billhook-packed"
    version: Literal[1] = 1
    dtype: Literal["bf16", "fp16", "fp32"] = Field(description="Of the packed values.")
    config_sha256: str = Sha256
    layers: dict[str, LayerRecord]
    tensors: dict[str, TensorRecord]


class Sizes(NamedTuple):
    """Bytes of a model's weights."""

    layers: int
    """Of what is packed, packed."""
    dense_layers: int
    """Of the same layers, dense."""
    others: int
    """Of all other parameters, each once."""


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hex."""
    return hashlib.sha256(view_bytes(tensor)).hexdigest()


# --- read --------------------------------------------------------------------------------------------------------


def name_dtype(dtype: torch.dtype) -> str:
    """As a record has it."""
    return str(dtype).removeprefix("torch.")


def is_packed(directory: Path | str) -> bool:
    """Whether a directory holds a packed model."""
    return (Path(directory) / PACKED_FILE).is_file()


def read_contents(directory: Path | str) -> Contents:
    """What a packed model says of itself. Raises UserError where there is none, DamagedArtifact."""
    with _open(Path(directory)) as (_, contents):
        return contents


@contextmanager
def _open(directory: Path) -> Iterator[tuple[Any, Contents]]:
    """The file, which holds the tensors that its JSON names and no others."""
    path = directory / PACKED_FILE
    if not path.is_file():
        raise UserError(f"{directory} holds no packed model ({PACKED_FILE}); make one with python -m tools.export")
    with _blame(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        names = set(file.keys())
        text = metadata.get(KEY, "")
        _refuse_version(path, text)
        contents = Contents.model_validate_json(text)
        expected = set(contents.tensors)
        for name in contents.layers:
            expected |= {f"{name}.mask", f"{name}.values"}
        if len(expected) != len(contents.tensors) + 2 * len(contents.layers) or expected != names:
            raise ValueError("its tensors are not those that its metadata names")
        yield file, contents


@contextmanager
def _blame(path: Path) -> Iterator[None]:
    """Turn whatever is wrong in a file into one line of DamagedArtifact."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])[:200]
        raise DamagedArtifact(f"packed model {path} is damaged: metadata {where}: {problem['msg']}") from error
    except UserError:
        raise
    except (SafetensorError, ValueError, KeyError, OSError, RuntimeError, UnicodeError) as error:
        raise DamagedArtifact(f"packed model {path} is damaged: {in_one_line(error)}") from error


def _refuse_version(path: Path, text: str) -> None:
    """A later version may say anything else than this one."""
    values = json.loads(text) if text else {}
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > 1:
        raise UserError(f"packed model {path} has version {version} of the format; this Billhook reads 1")


def load_packed(
    directory: Path | str, device: torch.device | str = "cpu", warn: Callable[[str], None] = warnings.warn
) -> Any:
    """A transformers model in eval mode, with a PackedLinear for every packed layer and no dense copy of it.

    Where no kernel runs (`dispatch.explain_torch`) it is unpacked into a dense model, which `warn` is told.
    Raises UserError where there is no packed model or its config cannot be used, DamagedArtifact when a tensor, a hash
    or a shape is not what it must be.
    """
    directory, device = Path(directory), torch.device(device)
    with _open(directory) as (file, contents):
        dtype = getattr(torch, DTYPES[contents.dtype])
        reason = _explain_dense(dtype, device)
        model = _build_skeleton(directory, contents, dtype)
        layers = {layer.name: layer for layer in find_layers(model)}
        experts: dict[ExpertLinear, PackedWeight] = {}
        for name, record in contents.layers.items():
            if name not in layers:
                raise ValueError(f"the model that its config describes has no layer {name}")
            packed, module = _read_layer(file, layers[name], record, dtype), layers[name].module
            if isinstance(module, ExpertLinear):
                experts[module] = packed
            else:
                _install(model, layers[name], packed, dense=bool(reason))
        _install_experts(experts, dense=bool(reason))
        state = {name: _read_tensor(file, name, record) for name, record in contents.tensors.items()}
        answer = model.load_state_dict(state, strict=False, assign=True)
        if answer.unexpected_keys:
            raise ValueError(f"the model that its config describes has no tensor {answer.unexpected_keys[0]}")
        model.tie_weights()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta:
                raise ValueError(f"the tensor {name} is missing")
    if device.type == "cpu":
        settle_layers([module for module in model.modules() if isinstance(module, PackedLinear)])
    if reason:
        warn(f"{directory} is unpacked, and runs as a dense model does: {reason}")
    return model.to(device).eval().requires_grad_(False)


def _explain_dense(dtype: torch.dtype, device: torch.device) -> str:
    try:
        return explain_torch(dtype, device)
    except ValueError as error:
        raise UserError(str(error)) from error


def _build_skeleton(directory: Path, contents: Contents, dtype: torch.dtype) -> Any:
    """The model without weights; what its modules compute for themselves (rotary frequencies) is there."""
    import transformers
    from accelerate import init_empty_weights

    if hashlib.sha256((directory / "config.json").read_bytes()).hexdigest() != contents.config_sha256:
        raise ValueError("config.json is not the one that it was packed with")
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        with init_empty_weights(include_buffers=False):
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (directory / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:  # every way a config can be broken has a class of error of its own
        raise UserError(f"no model can be made of {directory / 'config.json'}: {in_one_line(error)}") from error
    return model


def _read_layer(file: Any, layer: Layer, record: LayerRecord, dtype: torch.dtype) -> PackedWeight:
    """Hash and structure checked in memory of our own, so that nobody can change it afterwards."""
    if tuple(layer.weight_OI.shape) != record.shape or isinstance(layer.module, Conv1D) != record.transposed:
        raise ValueError(f"layer {layer.name} is {record.shape}, in its config {tuple(layer.weight_OI.shape)}")
    mask_OW, values = file.get_tensor(f"{layer.name}.mask").clone(), file.get_tensor(f"{layer.name}.values").clone()
    if hash_tensor(mask_OW) != record.mask_sha256 or hash_tensor(values) != record.values_sha256:
        raise ValueError(f"layer {layer.name} does not match its hashes")
    if values.dtype != dtype:
        raise ValueError(f"layer {layer.name} has values of {values.dtype}, not {dtype}")
    try:
        packed = check_packed(mask_OW, values, record.shape)
    except ValueError as error:
        raise ValueError(f"layer {layer.name}: {error}") from error
    if values.numel() != record.nonzeros + PADDING:
        raise ValueError(f"layer {layer.name} has {values.numel() - PADDING} values, not {record.nonzeros}")
    return packed


def _read_tensor(file: Any, name: str, record: TensorRecord) -> Tensor:
    tensor: Tensor = file.get_tensor(name).clone()
    if list(tensor.shape) != record.shape or name_dtype(tensor.dtype) != record.dtype:
        raise ValueError(
            f"tensor {name} is {name_dtype(tensor.dtype)} {list(tensor.shape)}, not {record.dtype} {record.shape}"
        )
    if hash_tensor(tensor) != record.sha256:
        raise ValueError(f"tensor {name} does not match its hash")
    return tensor


def _install(model: nn.Module, layer: Layer, packed: PackedWeight, *, dense: bool) -> None:
    if dense:
        weight_OI = unpack_rows(packed)
        stored = weight_OI.T if isinstance(layer.module, Conv1D) else weight_OI
        layer.module.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
        return
    parent, _, name = layer.name.rpartition(".")
    bias_O = layer.module._parameters.get("bias")  # without values yet
    setattr(model.get_submodule(parent), name, PackedLinear(packed, bias_O))


def _install_experts(linears: Mapping[ExpertLinear, PackedWeight], *, dense: bool) -> None:
    """The same for fused experts. Raises ValueError where some of those that are stacked with others are missing."""
    for siblings in {id(linear.siblings): linear.siblings for linear in linears}.values():
        members = [linear for expert in siblings for linear in expert.values()]
        if not linears.keys() >= set(members):
            raise ValueError("some of its experts are packed, and others that are stacked with them are not")
        experts = members[0].experts
        if dense:
            for name, parameter in list_stacked(experts).items():
                experts._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            for linear in members:
                linear.weight.copy_(unpack_rows(linears[linear]))
        else:
            packed = {linear: PackedExpert(PackedLinear(linears[linear]), linear) for linear in members}
            replace_experts(experts, [{name: packed[x] for name, x in expert.items()} for expert in siblings])


# --- sizes -------------------------------------------------------------------------------------------------------


def measure_packed(shape: tuple[int, int], nonzeros: int, item: int) -> int:
    """Bytes of a packed layer on disk: mask, values of `item` bytes and their padding."""
    return 4 * shape[0] * -(-shape[1] // WORD) + item * (nonzeros + PADDING)


def measure_sizes(model: nn.Module) -> Sizes:
    """What a model's weights weigh in memory."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return Sizes(
        layers=sum(module.packed.nbytes for module in packed),
        dense_layers=sum(m.in_features * m.out_features * m.values.itemsize for m in packed),
        others=sum(parameter.nbytes for parameter in model.parameters()),
    )


def describe_packed(contents: Contents) -> str:
    """How much is packed, in one line."""
    layers = contents.layers.values()
    weights, kept = sum(x.shape[0] * x.shape[1] for x in layers), sum(x.nonzeros for x in layers)
    item = getattr(torch, DTYPES[contents.dtype]).itemsize
    size = sum(measure_packed(x.shape, x.nonzeros, item) for x in layers)
    return (
        f"{len(layers)} layers packed, {1 - kept / weights:.1%} of their weights zero: {show_size(size, 'MB')} instead "
        f"of {show_size(weights * item, 'MB')} in {contents.dtype}, {size / (weights * item):.3f} of it"
    )
