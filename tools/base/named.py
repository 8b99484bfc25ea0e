"""Named texts as options have them: NAME=SOURCE, and what each of them counts."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

NAME = r"[a-z][a-z0-9_]{0,31}"
"""The form of a text's name."""

MOST = 16
"""Texts of one run."""


def share_windows(each: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Of `each` text's windows as many as its share of the largest comes to; one at least of a text that counts."""
    return {name: max(round(each * share / max(shares.values())), share > 0) for name, share in shares.items()}


def read_texts(value: Any) -> Any:
    """Named texts from flags (a list of NAME=SOURCE), a variable (one a line) or YAML (a mapping).

    Raises ValueError in one line for one that has no name or source, or a name that is none or stands there twice.
    """
    if isinstance(value, str):
        value = [line for line in value.splitlines() if line.strip()]
    if isinstance(value, list):
        value = _join_pairs(value, "a text is given as NAME=SOURCE, such as code=file:code.txt")
    if not isinstance(value, dict):
        return value
    for name in value:
        _check_name(name)
    if len(value) > MOST:
        raise ValueError(f"a run has at most {MOST} named texts")
    return {name: source.strip() if isinstance(source, str) else source for name, source in value.items()}


def read_weights(value: Any, what: str = "weight", example: str = "code=3,prose=1") -> Any:
    """A number for each text, from NAME=NUMBER,NAME=NUMBER or a mapping. Raises ValueError in one line."""
    form = f"{what}s are given as NAME={what.upper()}, such as {example}"
    if isinstance(value, str):
        value = _join_pairs((part for part in value.split(",") if part.strip()), form)
    if not isinstance(value, dict):
        return value
    weights = {}
    for name, weight in value.items():
        _check_name(name)
        try:
            weights[name] = float(weight)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{form}; that of {name!r} is no number") from error
        if not 0 <= weights[name] < math.inf:
            raise ValueError(f"the {what} of {name!r} must be 0 or more")
    return weights


Texts = Annotated[dict[str, str], BeforeValidator(read_texts)]
"""A field of named texts, however they are given."""

Weights = Annotated[dict[str, float], BeforeValidator(read_weights)]
"""A field of what each of them counts."""


def _join_pairs(parts: Iterable[Any], form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in parts:
        name, sign, value = str(part).partition("=")
        name = name.strip()
        if not sign or not value.strip():
            raise ValueError(form)
        if name in pairs:
            raise ValueError(f"the name {name!r} is given twice")
        pairs[name] = value.strip()
    return pairs


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or re.fullmatch(NAME, name) is None:
        raise ValueError(
            f"{name!r} is no name of a text; names begin with a small letter, and have small letters, digits and _"
        )
