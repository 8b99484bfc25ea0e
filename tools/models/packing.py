"""A pruned model with its layers packed is written, a layer at a time; `packed.py` reads it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook_kernels.native import WORD
from billhook_kernels.packed import PADDING, find_kept, pack_rows
from tools.base.errors import UserError
from tools.base.files import write_directory
from tools.models.experts import ExpertLinear
from tools.models.formats import DTYPES, PACKED_FILE
from tools.models.layers import Layer, find_layers
from tools.models.packed import KEY, Contents, LayerRecord, TensorRecord, hash_tensor, name_dtype
from tools.models.streamed import find_stream
from tools.models.tensor_file import Form, write_tensors

LEAST_SPARSITY = 0.25
"""Share of zeros from which a layer is packed: with fewer, the dense product is about as fast."""

UNKNOWN = "0" * 64
"""In place of a hash that is not known yet."""


def save_packed(model: Any, tokenizer: Any, directory: Path, card: Callable[[Contents], str]) -> Contents:
    """Write a model with its sparse layers packed, config, tokenizer and card; whole or not at all.

    Layers with fewer zeros than LEAST_SPARSITY stay dense, and so does a weight that two modules share. Weights are
    read twice, to be counted and to be packed, and held packed one layer at a time; the model may be one that is
    streamed. Raises UserError when there is nothing to pack, DiskFull.
    """
    counts = _count_kept(model)
    if not counts:
        raise UserError(f"no layer of the model has {LEAST_SPARSITY:.0%} zeros; prune it before it is packed")
    dtypes = {layer.weight_OI.dtype for layer in counts}
    if len(dtypes) > 1:
        raise UserError(f"the layers have several number formats ({', '.join(map(str, dtypes))}); pack one of them")
    others = _list_others(model, {id(layer.parameter) for layer in counts})
    contents = _describe(counts, others)

    def pack() -> Iterator[tuple[str, Tensor]]:
        stream = find_stream(model)
        for layer in counts:
            packed, record = pack_rows(layer.weight_OI.cpu()), contents.layers[layer.name]
            record.mask_sha256, record.values_sha256 = hash_tensor(packed.mask_OW), hash_tensor(packed.values)
            yield f"{layer.name}.mask", packed.mask_OW
            yield f"{layer.name}.values", packed.values
        for name, tensor in others.items():
            contents.tensors[name].sha256 = hash_tensor(tensor)
            yield name, tensor
            if stream:
                stream.let_go()

    def write(aside: Path) -> None:
        model.config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(aside)
        (aside / "README.md").write_text(card(contents), encoding="utf-8")
        contents.config_sha256 = hashlib.sha256((aside / "config.json").read_bytes()).hexdigest()
        write_tensors(
            aside / PACKED_FILE, _list_forms(contents, others), pack(), lambda: {KEY: contents.model_dump_json()}
        )

    write_directory(directory, write)
    return contents


def _describe(counts: Mapping[Layer, int], others: Mapping[str, Tensor]) -> Contents:
    """What is known before a tensor is packed or hashed."""
    [dtype] = {layer.weight_OI.dtype for layer in counts}
    name: Any = next(name for name, known in DTYPES.items() if getattr(torch, known) == dtype)
    layers = {
        layer.name: LayerRecord(
            shape=(layer.weight_OI.shape[0], layer.weight_OI.shape[1]),
            transposed=isinstance(layer.module, Conv1D),
            nonzeros=kept,
            mask_sha256=UNKNOWN,
            values_sha256=UNKNOWN,
        )
        for layer, kept in counts.items()
    }
    tensors = {
        name: TensorRecord(shape=list(tensor.shape), dtype=name_dtype(tensor.dtype), sha256=UNKNOWN)
        for name, tensor in others.items()
    }
    return Contents(dtype=name, config_sha256=UNKNOWN, layers=layers, tensors=tensors)


def _list_forms(contents: Contents, others: Mapping[str, Tensor]) -> dict[str, Form]:
    """Those of all tensors of the file."""
    forms = {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in others.items()}
    for name, record in contents.layers.items():
        rows, columns = record.shape
        forms[f"{name}.mask"] = Form(torch.int32, (rows, -(-columns // WORD)))
        forms[f"{name}.values"] = Form(getattr(torch, DTYPES[contents.dtype]), (record.nonzeros + PADDING,))
    return forms


def _count_kept(model: Any) -> dict[Layer, int]:
    """The layers to pack, in depth order, and how many weights each keeps; of fused experts all or none, as they share
    their parameters."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    counts = {layer: int(find_kept(layer.weight_OI).sum()) for layer in find_layers(model)}
    dense = {id(_whole(x)) for x, kept in counts.items() if kept > (1 - LEAST_SPARSITY) * x.weight_OI.numel()}
    return {x: kept for x, kept in counts.items() if id(_whole(x)) not in dense and uses[id(x.parameter)] == 1}


def _whole(layer: Layer) -> nn.Module:
    """What is packed at once: the layer, or all experts that it is stacked with."""
    module: nn.Module = layer.module.experts if isinstance(layer.module, ExpertLinear) else layer.module
    return module


def _list_others(model: Any, packed: set[int]) -> dict[str, Tensor]:
    """The rest of the model's state on the CPU, tied tensors once, under the first of their names."""
    others, seen = {}, set[int]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in packed | seen:
            seen.add(id(tensor))
            others[name] = tensor.detach().cpu().contiguous()
    return others
