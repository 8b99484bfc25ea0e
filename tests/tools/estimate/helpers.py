"""Configs of models, settings for large ones, and sizes that the tests of this room count by hand."""

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_settings
from tools.base.settings import TeamSettings
from tools.estimate.phases import Phase

QWEN3_8B = {
    **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
    **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    **{"tie_word_embeddings": False, "dtype": "bfloat16"},
}
LLAMA_70B = {
    **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672},
    **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False},
    **{"dtype": "bfloat16"},
}
PROGRAM = "Python, torch and transformers"

MODEL = 103_040  # 25,760 parameters of the tiny Llama
DENSE = 61_440  # 15,360 prunable weights
STATE = 64 * 32 * 4  # one window between two blocks
FLOW = 64 * 464 * 4  # what the seven layers of a block read and write: 64 + 48 + 48 + 64 + 80 + 80 + 80 numbers a token
MATRIX = 48 * 48 * 4  # the second moment of what the widest layer reads
MEMBERS = 15_360 // 2  # weights of one block
MOMENTS = 4 * (6 * 32 * 32 + 48 * 48)


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    """A directory that holds a config.json and nothing else."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def large_settings(directory: Path, **changes: Any) -> TeamSettings:
    """The windows of configs/qwen3-8b.yaml."""
    windows = {"calibration_windows": 128, "gradient_windows": 16, "validation_windows": 64, "test_windows": 136}
    return tiny_settings(directory, **{"dtype": "bf16", "device": "cuda", "window": 2048, **windows, **changes})


def sizes(phase: Phase) -> tuple[list[int], list[int]]:
    """Bytes of the lines on the device, and in CPU memory without the program itself."""
    return [line.bytes for line in phase.device], [line.bytes for line in phase.host if line.what != PROGRAM]
