"""Writes the model in memory as a plain transformers directory."""

from pathlib import Path
from typing import Any

from tools.base.files import write_directory
from tools.models.streamed import find_stream


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
        model.save_pretrained(aside, **({"max_shard_size": stream.shard} if stream else {}))
        tokenizer.save_pretrained(aside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")

    write_directory(directory, write)
