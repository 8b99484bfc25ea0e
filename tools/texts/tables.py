"""Rows of a data set, on the hub or in a file, streamed in order."""

import glob
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.base.errors import UserError, in_one_line
from tools.base.hub import look_at_hub
from tools.base.named import parse_hub, path_of


def check_file(source: str, what: str, *suffixes: str) -> Path:
    """The path of a source `file:PATH` that is there and of the right kind; `what` it is. Raises UserError."""
    path = path_of(source)
    if not os.path.isfile(path):  # unlike Path's, it has an answer for a name too long
        raise UserError(f"{what} {path} does not exist")
    if path.suffix not in suffixes:
        raise UserError(f"{what} {path} must end in {' or '.join(suffixes)}")
    return path


@contextmanager
def explain_unreadable(what: str, source: str) -> Iterator[None]:
    """Inside, whatever goes wrong while rows are read becomes a UserError of one line; `what` the source is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # datasets raises a different class for every way a data set can be missing
        raise UserError(f"{what} {source!r} could not be read: {in_one_line(error)}") from error


def open_rows(source: str) -> Any:
    """The rows of a source `hub:…` or `file:…`, streamed in order.

    Raises UserError for a data set that is not here while no hub answers, and else whatever datasets raises.
    """
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    if source.startswith("hub:"):
        hub, problem = parse_hub(source), look_at_hub()
        try:  # streamed: C4 is 800 GB, and a run reads a few megabytes of it
            return datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True)
        except OSError as error:  # among them ConnectionError and FileNotFoundError
            if problem:
                raise UserError(f"data set {hub.name!r} is not on this machine, and {problem}") from error
            raise
    path = path_of(source)
    files = glob.escape(str(path))  # datasets takes a pattern
    if path.suffix == ".txt":
        return datasets.load_dataset("text", data_files=files, split="train", streaming=True, sample_by="document")
    return _read_objects(path)


def _read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file, of a list in it or of its lines, with every value as it stands there.

    datasets would guess one type for each column: a year among names loses its row, and a date is no text.
    """
    with open(path, encoding="utf-8-sig") as file:  # some editors of Windows begin files with a mark
        rows = _read_lines(file) if path.suffix == ".jsonl" else _read_whole(file.read())
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"rows must be objects, not {str(row)[:40]}")
            yield row


def _read_whole(text: str) -> Iterable[Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:  # lines of JSON are called so, too
        return _read_lines(text.split("\n"))
    return found if isinstance(found, list) else [found]


def _read_lines(lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error
