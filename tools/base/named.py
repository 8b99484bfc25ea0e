"""Named texts as options have them: NAME=SOURCE, and what each of them counts."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from tools.base.errors import UserError

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""The form of a run's name."""

_HUB_ID = r"[\w.-]+(/[\w.-]+)?"
"""The form of a model's id on the hub."""


def is_hub_id(source: str) -> bool:
    """Whether a model's source can only be one of the hub: nothing on this machine has the name."""
    here = os.path.exists(os.path.expanduser(source)) or source.startswith((".", "/", "~")) or source.endswith(".gguf")
    return not here and re.fullmatch(_HUB_ID, source) is not None


class HubText(NamedTuple):
    """A data set on the hub."""

    name: str
    config: str | None
    split: str


def parse_hub(source: str) -> HubText:
    """`hub:NAME[/CONFIG]:SPLIT`, NAME with or without its organisation. Raises UserError for another form."""
    form = re.fullmatch(r"hub:(?P<path>[^:\s]+):(?P<split>[\w\[\]:%.-]+)", source)
    parts = form["path"].split("/") if form else []
    if form is None or not 1 <= len(parts) <= 3 or not all(parts):
        raise UserError(
            f"text source {source!r} is not of the form hub:NAME[/CONFIG]:SPLIT, "
            "such as hub:Salesforce/wikitext/wikitext-2-raw-v1:test"
        )
    return HubText("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, form["split"])


def path_of(source: str) -> Path:
    """The path of a source `file:PATH`."""
    return Path(os.path.expanduser(source.removeprefix("file:")))  # Path.expanduser raises for ~nobody


def name_source(source: str) -> str:
    """A text's source, the same whatever directory one works in."""
    return f"file:{path_of(source).absolute()}" if source.startswith("file:") else source


_NEXT = r" with \d+% | \+ [\d.]+(e-\d+)?(% | of )"
"""What parts several texts where they are named behind one another: a share is told of the next."""


def hide_directories(text: str) -> str:
    """A text's name, or several, as `name_source` gives them, for strangers: of files no more than their names."""
    return re.sub(rf"file:.*?(?=[^/]*({_NEXT}|$))", "file:", text)


def hide_path(source: str) -> str:
    """A model's or text's source for strangers: of a file or directory on this machine no more than its name."""
    kind, path = ("file:", source[5:]) if source.startswith("file:") else ("", source)
    hidden = source.startswith(("hub:", "package:", "self:")) or is_hub_id(source)
    return source if hidden else kind + Path(path).expanduser().resolve().name


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
