"""Files of llama.cpp: read quickly by transformers, and written of models that were read from such files."""

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.base.errors import UserError, in_one_line
from tools.models.mapped import map_source

_REPEATED = ("GGUFReader", "get_tensor_name_map")
"""What transformers asks of the package gguf again and again while it loads one file."""

PERMUTED = {"llama": True, "qwen2": False, "qwen3": False}
"""Architectures that are written, by llama.cpp's names, and whether it has rows of queries and keys in another order
than transformers: the two halves that a rotary embedding turns into one another by turns."""

_turn = threading.RLock()


def describe_by_hand(directory: Path) -> str:
    """What may write the file where this does not."""
    return f"llama.cpp may: python convert_hf_to_gguf.py {directory} --outfile model.gguf"


@contextmanager
def reading_once() -> Iterator[None]:
    """Inside, the head of a .gguf file is parsed once, and the names of its tensors are made once.

    transformers parses it anew for the tokenizer, the config and the weights, and makes the names of all tensors at
    every module of the model: more than half of the time in which a small model is loaded. Only one thread is inside.
    """
    import gguf

    with _turn:
        before = {name: getattr(gguf, name) for name in _REPEATED}
        for name, function in before.items():
            setattr(gguf, name, functools.cache(function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(gguf, name, function)


def read_pieces(path: str, empty: Any, size: int) -> Iterator[dict[str, Tensor]]:
    """The weights of a .gguf file by transformers' names and in the dtypes of the model `empty`, which has none.

    transformers reads all tensors of a file at once; it is shown some of them at a time, of `size` bytes each time or
    one tensor. To be asked inside `reading_once`. Not of models whose experts it puts together of several tensors.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    dtypes = {name: parameter.dtype for name, parameter in empty.named_parameters(remove_duplicate=False)}
    reader = gguf.GGUFReader(path)
    every, reader.tensors = reader.tensors, []
    try:
        for tensor in every:
            reader.tensors.append(tensor)
            if tensor is every[-1] or sum(int(own.n_elements) for own in reader.tensors) * 4 >= size:
                found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)["tensors"]
                yield {name: found.pop(name).to(dtypes[name]).contiguous() for name in list(found) if name in dtypes}
                reader.tensors = []
    finally:
        reader.tensors = every


# --- written ------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    array: NDArray[Any]
    kind: Any
    """Of gguf.GGMLQuantizationType."""


def write_gguf(directory: Path, source: Path, path: Path) -> None:
    """Write the model in a directory, the dense one of which was read from the .gguf file `source`, as such a file.

    Matrices are in the directory's number format, vectors in fp32: the weights that were measured, to the bit, which
    llama.cpp may quantise again. Tokenizer, template and all else come from `source`; sizes are the model's own. Raises
    UserError for architectures, and shapes, that cannot be written so.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(source)
    except Exception as error:  # every way a file can be broken has a class of error of its own
        raise UserError(f"{source} cannot be read as a .gguf file: {in_one_line(error)}") from error
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in PERMUTED:
        raise UserError(f"models of {architecture} are not written as .gguf here; {describe_by_hand(directory)}")
    config, tensors = _read_config(directory), map_source(str(directory))
    changed = _list_sizes(reader, architecture, config)
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.size_label", "general.file_type"):
            continue
        value = changed.pop(name) if name in changed else field.contents()
        if field.types[0] != gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, value, field.types[0])
        elif len(field.data):
            writer.add_key_value(name, value, field.types[0], field.types[-1])
    for name, value in changed.items():
        writer.add_uint32(name, value)
    kinds = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[kinds[max(tensors.values(), key=Tensor.dim).dtype]])
    try:
        for entry in _list_entries(tensors, reader, architecture, config):
            writer.add_tensor_info(
                entry.name, entry.array.shape, entry.array.dtype, entry.array.nbytes, raw_dtype=entry.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in _list_entries(tensors, reader, architecture, config):
            writer.write_tensor_data(entry.array)
    finally:
        writer.close()


def _read_config(directory: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(directory).get_text_config()


def _list_sizes(reader: Any, architecture: str, config: Any) -> dict[str, int]:
    """What the file says of sizes, by its keys. Raises UserError where they differ from block to block."""
    found = {
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head * config.num_attention_heads != config.hidden_size:  # what is taken for granted otherwise
        found |= {"attention.key_length": head, "attention.value_length": head}
    sizes = {f"{architecture}.{name}": int(size) for name, size in found.items()}
    for name in sizes:
        if name in reader.fields and not isinstance(reader.fields[name].contents(), int):
            raise UserError(f"{name} differs from block to block in the model's own .gguf file; nothing is written")
    return sizes


def _list_entries(tensors: Mapping[str, Tensor], reader: Any, architecture: str, config: Any) -> Iterator[_Entry]:
    """The tensors as they lie in the file; of the source those that transformers has no name for. Raises UserError."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names, written = gguf.get_tensor_name_map(number, config.num_hidden_layers), set[str]()
    for name, tensor in tensors.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp has no name for {name}; nothing is written")
        if PERMUTED[architecture] and (heads := _count_heads(name, config)):
            halves = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2)
            tensor = halves.reshape(tensor.shape)
        written.add(found)
        yield _Entry(found, *_lay_out(tensor))
    for own in reader.tensors:  # such as frequencies of rotary embeddings
        if not own.name.startswith("blk.") and own.name not in written and own.name != "output.weight":
            yield _Entry(own.name, own.data, own.tensor_type)


def _count_heads(name: str, config: Any) -> int:
    """How many heads the rows of a layer are of, if it makes queries or keys; else 0."""
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else 0


def _lay_out(tensor: Tensor) -> tuple[NDArray[Any], Any]:
    """(numbers, or the bytes of formats that numpy has not; what they are)."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.dim() < 2:
        return tensor.float().numpy(), kinds.F32
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint8).numpy(), kinds.BF16
    return tensor.contiguous().numpy(), kinds.F16 if tensor.dtype == torch.float16 else kinds.F32


def list_changed(model: Any, directory: Path) -> list[str]:
    """The tensors of a model directory that a model has not, or not to the bit."""
    ours = model.state_dict()
    return [
        name
        for name, tensor in map_source(str(directory)).items()
        if name not in ours or not torch.equal(ours[name], tensor)
    ]
