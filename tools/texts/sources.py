"""Where running text comes from: every kind of source, how it is checked, and how its documents are read.

A new kind is one entry of SOURCES, and its form in `tools.base.settings.TEXT_FORMS`, of which the flags' help is made.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tools.base.errors import UserError
from tools.base.named import parse_hub
from tools.base.settings import TEXT_SOURCE
from tools.texts.questions import Question, check_file, explain_unreadable, open_rows, write_pair
from tools.texts.written import parse_prompts


class Source(NamedTuple):
    """A kind of source; its functions are given the source as it was written."""

    sentence: str
    """What it is, without a full stop."""
    check: Callable[[str], object]
    """Refuses, before anything is loaded, what cannot be read; raises UserError."""
    read: Callable[[str], Iterator[str]] | None
    """Its documents, in order; None where the model writes them."""


def check_source(source: str) -> None:
    """Refuse, before anything is loaded, a source that cannot be read. Raises UserError."""
    _find(source).check(source)


def read_documents(source: str) -> Iterator[str]:
    """The documents of a source, in order, of one that the model does not write itself.

    Raises UserError when it cannot be read or has no text.
    """
    check_source(source)
    read = _find(source).read
    assert read is not None, "what the model writes is not read"
    return read(source)


def _find(source: str) -> Source:
    kind, colon, _ = source.partition(":")
    if kind + colon not in SOURCES:
        raise UserError(f"text source {source!r} is not one of {TEXT_SOURCE}")
    return SOURCES[kind + colon]


# --- data sets on the hub, and files ---------------------------------------------------------------------------------


def _check_file(source: str) -> None:
    path = check_file(source, "text file", ".txt", ".jsonl")
    if not os.path.getsize(path):
        raise UserError(f"text file {path} is empty")


def _read_rows(source: str) -> Iterator[str]:
    with explain_unreadable("text source", source):
        for row in open_rows(source):
            yield _text_of(row, source)


def _text_of(row: dict[str, Any], source: str) -> str:
    keys = [key for key in ("text", "content", "document") if key in row]
    for key in keys:
        if isinstance(row[key], str):
            return str(row[key])
    if any(row[key] is None for key in keys):
        return ""  # a row without text
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return write_pair(Question(row["question"], (row["answer"],)))
    raise UserError(f"text source {source!r} has no text in a column text, content or document, but {sorted(row)[:10]}")


# --- CPython's own documentation -------------------------------------------------------------------------------------


def _read_pydoc(source: str) -> Iterator[str]:
    """CPython's own reference prose. Its topics quote one another, so a paragraph is taken only once."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        fresh = []
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        yield "\n\n".join(fresh)


SOURCES = {
    "hub:": Source("a data set on the hub, streamed, with a column text, content or document", parse_hub, _read_rows),
    "file:": Source(
        "a text file as one document, or a JSON object a line, with such a column", _check_file, _read_rows
    ),
    "pydoc": Source("Python's own reference prose, which is on every machine", lambda source: None, _read_pydoc),
    "self": Source("what the dense model writes itself at temperature 1, from its first token", parse_prompts, None),
    "self:": Source(
        "the same from a prompt, for chat models the answers to it as a user's turn; several are separated by ' | '",
        parse_prompts,
        None,
    ),
}
"""By what a source begins with: a word and a colon, or the word alone where nothing is to be chosen."""
