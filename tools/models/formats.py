"""Names of number formats."""

from typing import Literal

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names of the config's number formats in torch."""
