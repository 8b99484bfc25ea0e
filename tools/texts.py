"""Where text comes from, and how it becomes three disjoint sets of token windows."""

import glob
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.errors import UserError
from tools.settings import TEXT_SOURCE, WorkbenchSettings

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("calibration", "validation", "test")
SHINGLE = 64
"""Tokens in a row that two splits may not share."""


class Windows(NamedTuple):
    """Token ids of the three splits, each (windows, window) int64."""

    calibration: "Tensor"
    validation: "Tensor"
    test: "Tensor"


def check_source(source: str) -> None:
    """Refuse, before anything is loaded, a source that cannot be read. Raises UserError."""
    if source == "pydoc" or source.startswith("hub:"):
        if source != "pydoc":
            parse_hub(source)
        return
    if not source.startswith("file:"):
        raise UserError(f"text source {source!r} is not one of {TEXT_SOURCE}")
    path = path_of(source)
    if not os.path.isfile(path):  # unlike Path's, it has an answer for a name too long
        raise UserError(f"text file {path} does not exist")
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"text file {path} must end in .txt or .jsonl")
    if not os.path.getsize(path):
        raise UserError(f"text file {path} is empty")


def check_texts(settings: WorkbenchSettings) -> None:
    """Refuse, before anything is loaded, texts that cannot be read. Raises UserError."""
    for split in SPLITS:
        check_source(getattr(settings, split))


def path_of(source: str) -> Path:
    """The path of a source `file:PATH`."""
    return Path(os.path.expanduser(source.removeprefix("file:")))  # Path.expanduser raises for ~nobody


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


def read_documents(source: str) -> Iterator[str]:
    """The documents of a source, in order. Raises UserError when it cannot be read or has no text."""
    check_source(source)
    if source == "pydoc":
        yield from _read_pydoc()
        return
    try:
        rows = open_rows(source)
        for row in rows:
            yield _text_of(row, source)
    except UserError:
        raise
    except Exception as error:  # datasets raises a different class for every way a data set can be missing
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"text source {source!r} could not be read: {line}") from error


def open_rows(source: str) -> Any:
    """The rows of a source `hub:…` or `file:…`, streamed in order. Raises whatever datasets raises."""
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    if source.startswith("hub:"):
        hub = parse_hub(source)  # streamed: C4 is 800 GB, and a run reads a few megabytes of it
        return datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True)
    path = path_of(source)
    files = glob.escape(str(path))  # datasets takes a pattern
    if path.suffix == ".txt":
        return datasets.load_dataset("text", data_files=files, split="train", streaming=True, sample_by="document")
    return datasets.load_dataset("json", data_files=files, split="train", streaming=True)


def _text_of(row: dict[str, Any], source: str) -> str:
    keys = [key for key in ("text", "content", "document") if key in row]
    for key in keys:
        if isinstance(row[key], str):
            return str(row[key])
    if any(row[key] is None for key in keys):
        return ""  # a row without text
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return f"Question: {row['question']}\nAnswer: {row['answer']}"
    raise UserError(f"text source {source!r} has no text in a column text, content or document, but {sorted(row)[:10]}")


def _read_pydoc() -> Iterator[str]:
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


def cut_windows(settings: WorkbenchSettings, tokenizer: Any) -> Windows:
    """Three disjoint sets of windows; splits with the same source take consecutive parts of it.

    Raises UserError when a source is too short for the windows asked for, or two splits share text.
    """
    import torch

    counts = {split: getattr(settings, f"{split}_windows") for split in SPLITS}
    sources = {split: getattr(settings, split) for split in SPLITS}
    windows: dict[str, Tensor] = {}
    for source in dict.fromkeys(sources.values()):
        sharing = [split for split in SPLITS if sources[split] == source]
        ids = _tokenize(source, tokenizer, settings.window, {split: counts[split] for split in sharing})
        for split, part in zip(sharing, torch.split(ids, [counts[split] for split in sharing]), strict=True):
            windows[split] = part
    result = Windows(**windows)
    _refuse_overlap(result, tokenizer)
    return result


def _tokenize(source: str, tokenizer: Any, window: int, counts: dict[str, int]) -> "Tensor":
    """Enough tokens of a source for all the windows cut from it: (windows, window)."""
    import torch

    needed = window * sum(counts.values())
    ids: list[int] = []
    for document in read_documents(source):
        if document.strip():
            ids += tokenizer(document.strip() + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(-1, window)
    asked = " + ".join(f"{count} {split}" for split, count in counts.items())
    raise UserError(
        f"text source {source!r} is too short: {asked} windows of {window} tokens need {needed} tokens, "
        f"but it has {len(ids)}; ask for fewer or shorter windows"
    )


def _refuse_overlap(windows: Windows, tokenizer: Any) -> None:
    length = min(SHINGLE, *(part.numel() for part in windows))
    hashes = {split: _hash_shingles(part, length) for split, part in zip(SPLITS, windows, strict=True)}
    for first, second in (("calibration", "validation"), ("calibration", "test"), ("validation", "test")):
        shared = np.isin(hashes[second], hashes[first])
        if shared.any():
            at = int(shared.argmax())
            ids = getattr(windows, second).reshape(-1)[at : at + length].tolist()
            text = " ".join(tokenizer.decode(ids).split())[:100]
            raise UserError(
                f"the {first} and {second} texts overlap ({int(shared.sum())} runs of {length} tokens, "
                f"such as {text!r}); choose disjoint texts"
            )


def _hash_shingles(windows: "Tensor", length: int) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of every run of `length` tokens, over the whole split."""
    tokens = windows.reshape(-1).numpy().astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(len(tokens) - length + 1, dtype=np.uint64)
    for offset in range(length):  # Horner's rule, wrapping at 2^64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + len(hashes)]
    return hashes
