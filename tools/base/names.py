"""What a model or a text is called: on the hub, or where it lies on this machine. Nothing is opened here."""

import os
import re
from pathlib import Path
from typing import NamedTuple

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
