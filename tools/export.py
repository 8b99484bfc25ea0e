"""Write the model in the workbench as a plain transformers directory that stock `from_pretrained` loads."""

import shutil
from pathlib import Path
from typing import Any

from tools.files import explain_full_disk


def export_model(model: Any, tokenizer: Any, directory: Path, card: str) -> None:
    """Write weights (safetensors), config, generation config, tokenizer and model card; whole or not at all.

    What a dequantised GGUF says of its quantisation is removed, and no `sparsity_config` is written: serving stacks
    refuse it even for dense weights. Raises DiskFull when no space is left.
    """
    aside = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with explain_full_disk(directory):
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(aside)
            (aside / "README.md").write_text(card, encoding="utf-8")
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for file in aside.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)
