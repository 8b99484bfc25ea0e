"""N:M, N zeros in every M consecutive inputs."""

import re
from typing import Annotated

from pydantic import AfterValidator


def parse_pattern(text: str) -> tuple[int, int]:
    """`"N:M"` to (N zeroed, of M consecutive inputs). Raises ValueError in one line when it is not 0 < N < M."""
    form = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text, re.ASCII)
    if form is None or not 0 < int(form[1]) < int(form[2]):
        raise ValueError(f"pattern {text!r} is not N:M with 0 < N < M, such as 2:4")
    return int(form[1]), int(form[2])


def _check_pattern(value: str) -> str:
    if value:
        parse_pattern(value)
    return value


PatternText = Annotated[str, AfterValidator(_check_pattern)]
"""N:M, N zeros in every M consecutive inputs, or empty."""


def count_pattern_zeros(weights: int, pattern: tuple[int, int]) -> int:
    """Zeros of a layer in which (N, M) holds."""
    pruned, group = pattern
    return weights // group * pruned
