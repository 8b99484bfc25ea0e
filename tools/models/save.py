"""Writes the model in memory as a plain transformers directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from tools.base.files import write_directory
from tools.models.layers import name_blocks
from tools.models.mapped import map_tensors
from tools.models.streamed import Stream, find_stream


def forget_quantization(model: Any) -> None:
    """Remove from a config what it says of the quantised file that the weights, which are not, were read from."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def export_model(model: Any, tokenizer: Any, directory: Path, card: str) -> None:
    """Write the model in the workbench as a plain transformers directory that stock `from_pretrained` loads.

    Weights (safetensors), config, generation config, tokenizer and model card; whole or not at all.
    What a dequantised GGUF says of its quantisation is removed, and no `sparsity_config` is written: serving stacks
    refuse it even for dense weights. A model that is streamed is written in small files, which pass through memory one
    by one. Raises DiskFull when no space is left.
    """
    forget_quantization(model)

    def write(aside: Path) -> None:
        stream = find_stream(model)
        if stream:
            state = _convert_by_block(model, stream)
            model.save_pretrained(aside, state_dict=state, save_original_format=False, max_shard_size=stream.shard)
        else:
            model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")

    write_directory(directory, write)


def _convert_by_block(model: Any, stream: Stream) -> dict[str, Tensor]:
    """What the files of a streamed model have, as transformers' own conversion makes it of the weights in memory.

    It takes the stacked experts of every block apart, and would hold copies of all of them at once: so one block
    after another, and the copies lie in a file that has no name, beside the model's own. Raises DiskFull.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    prefix, parts, same = f"{name_blocks(model)}.", dict[str, dict[str, Tensor]](), dict[str, Tensor]()
    for name, tensor in remove_tied_weights_from_state_dict(model.state_dict(), model).items():
        block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        parts.setdefault(block, {})[name] = tensor

    def list_copies() -> Iterator[tuple[str, Tensor]]:
        for part in parts.values():
            mapped = {tensor.untyped_storage().data_ptr() for tensor in part.values()}
            for name, tensor in revert_weight_conversion(model, part).items():
                if tensor.untyped_storage().data_ptr() in mapped:
                    same[name] = tensor
                else:
                    yield name, tensor

    return same | dict(map_tensors(list_copies(), stream.scratch, "weights on their way to the export"))
