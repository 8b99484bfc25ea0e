"""How text becomes three disjoint sets of token windows."""

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.base.errors import SharedText, UserError
from tools.base.named import path_of, share_windows
from tools.base.settings import MOST_SPREAD, QUESTIONS, RUN, SPLITS, Calibration, WorkbenchSettings
from tools.texts.questions import check_questions, mix_questions, write_questions
from tools.texts.sources import check_source, read_documents
from tools.texts.written import (
    WrittenText,
    count_windows,
    deal_prompts,
    find_source,
    is_written,
    name_part,
    split_part,
)

if TYPE_CHECKING:
    from torch import Tensor

SHINGLE = 64
"""Tokens in a row that two splits may not share."""

MOST_SHARED = 0.01
"""Share of a source's runs of so many tokens that may stand in another source, where no windows have them: boilerplate
is no leak, a document of which one split has the beginning and one the end is."""


CHARACTERS = 8
"""Of a token, more than there are on average in words and code: so much of a long text is read first."""

UNSURE = 64
"""Tokens at the end of a beginning of a text that might be others once it goes on."""


class Windows(NamedTuple):
    """Token ids of the splits, each (windows, lead + window) int64.

    Where texts have names, a split is the windows of one text after another, as many of each.
    """

    calibration: "Tensor"
    validation: "Tensor"
    test: "Tensor"
    mixed: "dict[Calibration, Tensor]"
    """The run's calibration text behind as many windows of questions, where there are enough of them."""
    lead: int = 0
    """Tokens of each window that are no text: 1 where it begins with the beginning-of-sequence token."""
    texts: tuple[str, ...] = ()
    """The names of the texts, where they have names."""

    def find_text(self, name: str) -> "Tensor":
        """The windows of a split, or of a calibration text, by its name (`tools.base.settings.Calibration`)."""
        mixed = {str(text): windows_BT for text, windows_BT in self.mixed.items()}
        windows_BT: Tensor = mixed[name] if name in mixed else getattr(self, "calibration" if name == "run" else name)
        return windows_BT

    def count_each(self, split: str) -> int:
        """How many windows of a split each text has."""
        return len(self.find_text(split)) // max(len(self.texts), 1)

    def list_each(self, split: str, of_each: Sequence[int]) -> list[int]:
        """The windows of a split that are these of each text."""
        each = self.count_each(split)
        return [text * each + window for text in range(max(len(self.texts), 1)) for window in of_each]

    def list_spread(self, split: str, of_each: int) -> list[int]:
        """So many windows of each text of a split, as `spread_windows` takes them."""
        return self.list_each(split, spread_windows(of_each, self.count_each(split)))

    def name_each(self, split: str, windows: Sequence[int]) -> list[str]:
        """The text of each of some windows of a split; empty where texts have no names."""
        each = self.count_each(split)
        return [self.texts[window // each] for window in windows] if self.texts else []

    def list_shares(self, shares: Mapping[str, float], text: Calibration = "run") -> dict[int, float]:
        """The windows of a calibration text that count, with what their text does; 1 where there are no shares."""
        windows = range(len(self.find_text(text)))
        if not shares:
            return dict.fromkeys(windows, 1.0)
        names = (QUESTIONS, RUN) if text == QUESTIONS else self.texts
        each = len(windows) // len(names)
        return {window: share for window in windows if (share := shares[names[window // each]])}

    def list_in_proportion(self, shares: Mapping[str, float]) -> list[int]:
        """The calibration windows, of each text that counts as many as its share of the largest comes to, or one;
        dealt in turn, so that the first of them are of all these texts.
        """
        if not self.texts:
            return list(range(len(self.calibration)))
        each = self.count_each("calibration")
        counts = share_windows(each, {name: shares[name] for name in self.texts})
        dealt = [
            ((place + 0.5) / counts[name], text * each + window)
            for text, name in enumerate(self.texts)
            for place, window in enumerate(spread_windows(counts[name], each))
        ]
        return [window for _, window in sorted(dealt)]


def spread_windows(count: int, total: int) -> list[int]:
    """So many of a text's `total` windows, in the order of the text: those of a smaller count are among those of a
    greater one.

    A text is not alike from end to end, and its first windows may be easier than the rest: figures on few windows are
    near those on all of them only where the few are spread. They are taken by their numbers in binary, read backwards
    (van der Corput's order): 0, 4, 2, 6, 1, 5, 3, 7 of eight. Half of them are every other one.
    """
    digits = (total - 1).bit_length()
    order = sorted(range(total), key=lambda window: f"{window:0{digits}b}"[::-1])
    return sorted(order[:count])


def find_bos(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token, where the tokenizer itself begins a text with it; asked by doing so."""
    begun = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return begun[0] if begun == [tokenizer.bos_token_id] else None


def count_lead(settings: WorkbenchSettings, tokenizer: Any) -> int:
    """Tokens of each window that are no text."""
    return int(settings.bos == "auto" and find_bos(tokenizer) is not None)


def check_texts(settings: WorkbenchSettings) -> None:
    """Refuse, before anything is loaded, texts that cannot be read. Raises UserError."""
    sources = {part: find_source(settings, part) for part in count_windows(settings) if split_part(part)[1] in SPLITS}
    for source in sources.values():
        if not _is_asked(settings, source):
            check_source(source)
    deal_prompts(settings)
    if settings.questions:
        check_questions(settings.questions)
    for part, source in sources.items():
        if _is_same(source, settings.questions) and not settings.text:
            raise UserError(
                f"the questions and the {part} text are the same, {settings.questions!r}; some questions of a source "
                "are taken into the calibration text, and no others, with --calibration-mix"
            )


def cut_windows(settings: WorkbenchSettings, tokenizer: Any, write: WrittenText | None = None) -> Windows:
    """Disjoint sets of windows; splits, and named texts, with the same source take consecutive parts of it.

    Of every S windows in a row of a source one is taken (`text_spread`): the first with `text_cut` 0, the one behind
    it with 1, and from S on those of the stretch behind. What the model writes itself is asked of `write`, part by part
    (`tools.texts.written.count_windows`); None where nothing is.

    A share `calibration_mix` of the calibration windows, evenly spread, is made of questions with answers that are
    asked nowhere else. The settings say whether each window begins with the tokenizer's beginning-of-sequence token:
    it then stands before as much text as without. Raises UserError when a source is too short for the windows asked
    for, two parts share text, or what the model wrote is of no use.
    """
    parts = _read_parts(settings, tokenizer)
    if write is not None:
        parts |= _cut_written(settings, write)
    mixed: dict[Calibration, Tensor] = {}
    if settings.questions and not settings.text:
        questions_BT = _cut_questions(settings, tokenizer)
        parts["calibration"], mixed = mix_questions(settings, parts["calibration"], questions_BT)
    _check_overlap(parts, mixed, tokenizer)
    calibration, validation, test = (_join(parts, settings, split) for split in SPLITS)
    result = Windows(calibration, validation, test, mixed, texts=tuple(settings.text))
    return _begin(result, tokenizer.bos_token_id) if count_lead(settings, tokenizer) else result


def _join(parts: "dict[str, Tensor]", settings: WorkbenchSettings, split: str) -> "Tensor":
    """The windows of a split, of one text after another."""
    import torch

    return torch.cat([parts[name_part(text, split)] for text in settings.text or [""]])


def check_windows(settings: WorkbenchSettings, tokenizer: Any) -> None:
    """Raises UserError where `cut_windows` would, of all text that the model does not write itself."""
    if settings.questions and not settings.text:
        _cut_questions(settings, tokenizer)
    _check_overlap(_read_parts(settings, tokenizer), {}, tokenizer)


def _read_parts(settings: WorkbenchSettings, tokenizer: Any) -> "dict[str, Tensor]":
    """The windows of every part whose text is read: one of each row of what its source is read for.

    Raises SharedText when that of two sources shares more than boilerplate, in windows or between them.
    """
    stretches = _cut_read(settings, tokenizer)
    sources = {part: find_source(settings, part) for part in stretches}
    pairs = [pair for pair in _pair_parts(stretches) if sources[pair[0]] != sources[pair[1]]]
    _check_shared(stretches, pairs, MOST_SHARED, tokenizer)
    return {
        part: stretch_NST[:, settings.text_cut % stretch_NST.shape[1]].contiguous()
        for part, stretch_NST in stretches.items()
    }


def _cut_read(settings: WorkbenchSettings, tokenizer: Any) -> "dict[str, Tensor]":
    """What the source of every part whose text is read is read for: (windows, spread, window)."""
    import torch

    counts = count_windows(settings)
    sources = {part: find_source(settings, part) for part in counts}
    stretches: dict[str, Tensor] = {}
    for source in dict.fromkeys(source for source in sources.values() if not is_written(source)):
        asked = {part: counts[part] for part in sources if sources[part] == source}
        is_asked = _is_asked(settings, source)
        documents = write_questions(settings) if is_asked else read_documents(source)
        # questions have no order that could matter
        by = settings.model_copy(update={"text_spread": 1}) if is_asked else settings
        most = by.text_spread or MOST_SPREAD
        ids = _read_tokens(documents, tokenizer, _reach(by.text_cut, most) * by.window * sum(asked.values()))
        beside = f" beside the {2 * settings.question_pairs} questions that are asked" if is_asked else ""
        pieces = torch.split(_cut(ids, source, by, asked, beside), list(asked.values()))
        stretches |= zip(asked, pieces, strict=True)
    return stretches


def _is_asked(settings: WorkbenchSettings, source: str) -> bool:
    """Whether a named text is of the questions that are asked: it then has those that are asked nowhere else."""
    return bool(settings.text) and _is_same(source, settings.questions)


def _is_same(source: str, other: str) -> bool:
    """Whether two sources are one, be its file written in two ways."""
    files = source.startswith("file:") and other.startswith("file:")
    return source == other or (files and os.path.realpath(path_of(source)) == os.path.realpath(path_of(other)))


def _cut_written(settings: WorkbenchSettings, write: WrittenText) -> "dict[str, Tensor]":
    """The windows of every part that the model writes, each from documents of its own."""
    import torch

    counts, dealt, windows = count_windows(settings), deal_prompts(settings), {}
    for part in (part for part in counts if is_written(find_source(settings, part))):
        tokens = counts[part] * settings.window
        prompts = dealt[part]
        ids = write(part, prompts, tokens) if tokens else []
        windows[part] = torch.tensor(ids[:tokens], dtype=torch.int64).view(-1, settings.window)
    return windows


def _begin(windows: Windows, bos: int) -> Windows:
    """The same windows, each behind the beginning-of-sequence token."""
    import torch

    def begin(text_BT: "Tensor") -> "Tensor":
        return torch.nn.functional.pad(text_BT, (1, 0), value=bos)

    splits = begin(windows.calibration), begin(windows.validation), begin(windows.test)
    mixed = {name: begin(text_BT) for name, text_BT in windows.mixed.items()}
    return Windows(*splits, mixed, lead=1, texts=windows.texts)


def _cut_questions(settings: WorkbenchSettings, tokenizer: Any) -> "Tensor":
    """As many windows of questions as are asked for or can be mixed in."""
    needed = settings.count_mixed(settings.calibration_mix)
    most = needed + settings.calibration_windows
    ids = _read_tokens(write_questions(settings), tokenizer, settings.window * most)
    count = max(needed, min(most, len(ids) // settings.window))
    # Which questions are the rest of those asked hangs on `text_cut`: the windows are the first of them.
    by = settings.model_copy(update={"text_cut": 0, "text_spread": 1})
    return _cut(ids, settings.questions, by, {"calibration": count})[:, 0].contiguous()


def _read_tokens(documents: Iterator[str], tokenizer: Any, needed: int) -> "array[int]":
    """The tokens of documents, in order: as many as are needed or more, or all that there are."""
    ids = array("q")
    for document in documents:
        if document.strip():
            ids.extend(_tokenize(document.strip() + "\n\n", tokenizer, needed - len(ids)))
        if len(ids) >= needed:
            break
    return ids


def _tokenize(text: str, tokenizer: Any, needed: int) -> Sequence[int]:
    """The tokens of a text, in order: as many as are needed or more, or all that there are.

    Of a long text no more is read than that takes: a beginning of it, less its last tokens, which might go on.
    """
    length = CHARACTERS * needed
    while length < len(text):
        ids: list[int] = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"][:-UNSURE]
        if len(ids) >= needed:
            return ids
        length *= 2
    whole: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return whole


def _reach(cut: int, spread: int) -> int:
    """How often all that is cut from a source must fit it for a cut at a spread."""
    return (cut // spread + 1) * spread


def _find_spread(settings: WorkbenchSettings, tokens: int, asked: int) -> int:
    """Of how many windows in a row of a source one is taken, by its tokens and those of all that is cut from it."""
    if settings.text_spread:
        return settings.text_spread
    fits = tokens // max(asked, 1)
    return min(fits, MOST_SPREAD) if fits > settings.text_cut else 1


def _cut(
    ids: "array[int]", source: str, settings: WorkbenchSettings, counts: dict[str, int], beside: str = ""
) -> "Tensor":
    """The stretch of a source that all its windows are cut from, one of each row: (windows, spread, window).

    `beside` says what of the source they are not from. Raises UserError when its tokens are too few.
    """
    import torch

    windows, window, cut = sum(counts.values()), settings.window, settings.text_cut
    spread = _find_spread(settings, len(ids), windows * window)
    end, length = _reach(cut, spread) * windows * window, spread * windows * window
    if len(ids) >= end:
        return torch.tensor(ids[end - length : end], dtype=torch.int64).view(windows, spread, window)
    asked = " + ".join(f"{count} {part}" for part, count in counts.items() if count)
    apart = f", one of every {spread}," if spread > 1 else ""
    behind = f" behind {end - length} that --text-cut {cut} passes over" if end > length else ""
    instead = f"{', or a smaller --text-spread' if spread > 1 else ''}{', or an earlier cut' if cut else ''}"
    raise UserError(
        f"text source {source!r} is too short: {asked} windows of {window} tokens{apart} need {length} tokens"
        f"{behind}, but it has {len(ids)}{beside}; ask for fewer or shorter windows{instead}"
    )


def _check_overlap(windows: "dict[str, Tensor]", mixed: "dict[Calibration, Tensor]", tokenizer: Any) -> None:
    """Raises SharedText when two parts share text. A mixed text that does, and nobody has asked for yet, is dropped."""
    hashes = _check_shared(windows, _pair_parts(windows), 0.0, tokenizer)
    length = _find_length(windows)
    for name, text_BT in list(mixed.items()):
        shingles = _hash_shingles(text_BT, length)
        if any(np.isin(of_part, shingles).any() for part, of_part in hashes.items() if part != "calibration"):
            del mixed[name]


def _check_shared(
    texts: "dict[str, Tensor]", pairs: Sequence[tuple[str, str]], most: float, tokenizer: Any
) -> dict[str, NDArray[np.uint64]]:
    """The hashes of all runs of tokens of the parts in the pairs. Raises SharedText when either of a pair has more than
    a share `most` of its runs in common with the other."""
    length = _find_length(texts)
    hashes = {part: _hash_shingles(texts[part], length) for part in dict.fromkeys(chain.from_iterable(pairs))}
    for first, second in pairs:
        shared = np.isin(hashes[second], hashes[first])
        if max(shared.mean(), np.isin(hashes[first], hashes[second]).mean()) > most:
            at = int(shared.argmax())
            ids = texts[second].reshape(-1)[at : at + length].tolist()
            text = " ".join(tokenizer.decode(ids).split())[:100]
            raise SharedText(
                f"the {first} and {second} texts overlap ({int(shared.sum())} runs of {length} tokens, "
                f"such as {text!r}); choose disjoint texts"
            )
    return hashes


def _pair_parts(texts: "dict[str, Tensor]") -> list[tuple[str, str]]:
    """Every two parts that have any windows, split by split."""
    parts = sorted((part for part in texts if len(texts[part])), key=lambda part: SPLITS.index(split_part(part)[1]))
    return list(combinations(parts, 2))


def _find_length(windows: "dict[str, Tensor]") -> int:
    """Of how many tokens a run is, that two parts may not share."""
    return min([SHINGLE, *(text.numel() for text in windows.values() if len(text))])


def _hash_shingles(windows: "Tensor", length: int) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of every run of `length` tokens, over the whole part."""
    tokens = windows.reshape(-1).numpy().astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(len(tokens) - length + 1, dtype=np.uint64)
    for offset in range(length):  # Horner's rule, wrapping at 2^64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + len(hashes)]
    return hashes
