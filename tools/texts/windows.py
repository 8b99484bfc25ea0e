"""How text becomes three disjoint sets of token windows."""

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.base.errors import UserError
from tools.base.settings import Calibration, WorkbenchSettings
from tools.texts.mixtures import mix_questions, write_questions
from tools.texts.questions import check_questions
from tools.texts.sources import check_source, read_documents
from tools.texts.written import SPLITS, WrittenText, count_windows, deal_prompts, find_source, is_written

if TYPE_CHECKING:
    from torch import Tensor

SHINGLE = 64
"""Tokens in a row that two splits may not share."""


class Windows(NamedTuple):
    """Token ids of the splits, each (windows, lead + window) int64."""

    calibration: "Tensor"
    validation: "Tensor"
    test: "Tensor"
    further: "Tensor"
    """More of the validation text, behind all else that its source is cut into, where any is asked for: windows for
    verdicts, then as many that finalists are compared on."""
    mixed: "dict[Calibration, Tensor]"
    """The calibration text with more questions in it, as far as there are enough of them."""
    lead: int = 0
    """Tokens of each window that are no text: 1 where it begins with the beginning-of-sequence token."""


def find_bos(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token, where the tokenizer itself begins a text with it; asked by doing so."""
    begun = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return begun[0] if begun == [tokenizer.bos_token_id] else None


def count_lead(settings: WorkbenchSettings, tokenizer: Any) -> int:
    """Tokens of each window that are no text."""
    return int(settings.bos == "auto" and find_bos(tokenizer) is not None)


def check_texts(settings: WorkbenchSettings) -> None:
    """Refuse, before anything is loaded, texts that cannot be read. Raises UserError."""
    for split in SPLITS:
        check_source(getattr(settings, split))
    deal_prompts(settings)
    if settings.questions:
        check_questions(settings.questions)
    for split in SPLITS:
        if settings.questions == getattr(settings, split):
            raise UserError(
                f"the questions and the {split} text are the same, {settings.questions!r}; some questions of a source "
                "are taken into the calibration text, and no others, with --calibration-mix"
            )


def cut_windows(settings: WorkbenchSettings, tokenizer: Any, write: WrittenText | None = None) -> Windows:
    """Disjoint sets of windows; splits with the same source take consecutive parts of it.

    With `text_cut` N that is the N-th stretch of a source, as long as the windows of all splits that share it. What the
    model writes itself is asked of `write`, split by split; None where nothing is.

    A share `calibration_mix` of the calibration windows, evenly spread, is made of questions with answers that are
    asked nowhere else. The settings say whether each window begins with the tokenizer's beginning-of-sequence token:
    it then stands before as much text as without. Raises UserError when a source is too short for the windows asked
    for, two splits share text, or what the model wrote is of no use.
    """
    windows = _cut_read(settings, tokenizer)
    if write is not None:
        windows |= _cut_written(settings, write)
    mixed: dict[Calibration, Tensor] = {}
    if settings.questions:
        questions_BT = _cut_questions(settings, tokenizer)
        windows["calibration"], mixed = mix_questions(settings, windows["calibration"], questions_BT)
    _check_overlap(windows, mixed, tokenizer)
    result = Windows(windows["calibration"], windows["validation"], windows["test"], windows["further"], mixed)
    return _begin(result, tokenizer.bos_token_id) if count_lead(settings, tokenizer) else result


def check_windows(settings: WorkbenchSettings, tokenizer: Any) -> None:
    """Raises UserError where `cut_windows` would, of all text that the model does not write itself."""
    if settings.questions:
        _cut_questions(settings, tokenizer)
    _check_overlap(_cut_read(settings, tokenizer), {}, tokenizer)


def _cut_read(settings: WorkbenchSettings, tokenizer: Any) -> "dict[str, Tensor]":
    """The windows of every split whose text is read."""
    import torch

    counts = count_windows(settings)
    sources = {split: find_source(settings, split) for split in counts}
    windows: dict[str, Tensor] = {}
    for source in dict.fromkeys(source for source in sources.values() if not is_written(source)):
        asked = {split: counts[split] for split in sources if sources[split] == source}
        ids = _read_tokens(read_documents(source), tokenizer, _reach(settings, asked))
        parts = torch.split(_cut(ids, source, settings, asked), list(asked.values()))
        windows |= zip(asked, parts, strict=True)
    return windows


def _cut_written(settings: WorkbenchSettings, write: WrittenText) -> "dict[str, Tensor]":
    """The windows of every split that the model writes, each from documents of its own."""
    import torch

    counts, dealt, windows = count_windows(settings), deal_prompts(settings), {}
    for split in (split for split in counts if is_written(find_source(settings, split))):
        tokens = counts[split] * settings.window
        ids = write(split, dealt["validation" if split == "further" else split], tokens) if tokens else []
        windows[split] = torch.tensor(ids[:tokens], dtype=torch.int64).view(-1, settings.window)
    return windows


def _begin(windows: Windows, bos: int) -> Windows:
    """The same windows, each behind the beginning-of-sequence token."""
    import torch

    def begin(text_BT: "Tensor") -> "Tensor":
        return torch.nn.functional.pad(text_BT, (1, 0), value=bos)

    splits = begin(windows.calibration), begin(windows.validation), begin(windows.test), begin(windows.further)
    return Windows(*splits, {name: begin(text_BT) for name, text_BT in windows.mixed.items()}, lead=1)


def _cut_questions(settings: WorkbenchSettings, tokenizer: Any) -> "Tensor":
    """As many windows of questions as are asked for or can be mixed in."""
    needed = settings.count_mixed(settings.calibration_mix)
    most = max([needed, *settings.mixes.values()])
    ids = _read_tokens(write_questions(settings), tokenizer, settings.window * most)
    count = max(needed, min(most, len(ids) // settings.window))
    # Which questions are the rest of those asked hangs on `text_cut`: the windows are the first of them.
    return _cut(ids, settings.questions, settings.model_copy(update={"text_cut": 0}), {"calibration": count})


def _read_tokens(documents: Iterator[str], tokenizer: Any, needed: int) -> list[int]:
    """The tokens of documents, in order: as many as are needed or more, or all that there are."""
    ids: list[int] = []
    for document in documents:
        if document.strip():
            ids += tokenizer(document.strip() + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed:
            break
    return ids


def _reach(settings: WorkbenchSettings, counts: dict[str, int]) -> int:
    """Tokens up to the end of the stretch of a source that the windows are cut from."""
    return (settings.text_cut + 1) * settings.window * sum(counts.values())


def _cut(ids: list[int], source: str, settings: WorkbenchSettings, counts: dict[str, int]) -> "Tensor":
    """All the windows that are cut from a source: (windows, window). Raises UserError when its tokens are too few."""
    import torch

    windows, window, cut = sum(counts.values()), settings.window, settings.text_cut
    end = _reach(settings, counts)
    if len(ids) >= end:
        return torch.tensor(ids[end - window * windows : end], dtype=torch.int64).view(windows, window)
    asked = " + ".join(f"{count} {split}" for split, count in counts.items() if count)
    behind = f" behind {end - window * windows} that --text-cut {cut} passes over" if cut else ""
    raise UserError(
        f"text source {source!r} is too short: {asked} windows of {window} tokens need {window * windows} tokens"
        f"{behind}, but it has {len(ids)}; ask for fewer or shorter windows{', or an earlier cut' if cut else ''}"
    )


def _check_overlap(windows: "dict[str, Tensor]", mixed: "dict[Calibration, Tensor]", tokenizer: Any) -> None:
    """Raises UserError when two splits share text. A mixed text that does, and nobody has asked for yet, is dropped."""
    splits = [split for split in (*SPLITS, "further") if split in windows and len(windows[split])]
    length = min([SHINGLE, *(windows[split].numel() for split in splits)])
    hashes = {split: _hash_shingles(windows[split], length) for split in splits}
    for first, second in combinations(splits, 2):
        shared = np.isin(hashes[second], hashes[first])
        if shared.any():
            at = int(shared.argmax())
            ids = windows[second].reshape(-1)[at : at + length].tolist()
            text = " ".join(tokenizer.decode(ids).split())[:100]
            raise UserError(
                f"the {first} and {second} texts overlap ({int(shared.sum())} runs of {length} tokens, "
                f"such as {text!r}); choose disjoint texts"
            )
    for name, text_BT in list(mixed.items()):
        shingles = _hash_shingles(text_BT, length)
        if any(np.isin(hashes[split], shingles).any() for split in splits if split != "calibration"):
            del mixed[name]


def _hash_shingles(windows: "Tensor", length: int) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of every run of `length` tokens, over the whole split."""
    tokens = windows.reshape(-1).numpy().astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(len(tokens) - length + 1, dtype=np.uint64)
    for offset in range(length):  # Horner's rule, wrapping at 2^64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + len(hashes)]
    return hashes
