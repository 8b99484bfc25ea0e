"""Text that the dense model writes itself, kept batch by batch, so that a run that was killed goes on with the next."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tools.base.errors import BrokenBaseline, DegenerateText, UserError, explain_work, in_one_line
from tools.base.progress import FIGURES, Progress, heed_stop
from tools.base.settings import WorkbenchSettings
from tools.base.words import count
from tools.models.positions import count_positions
from tools.models.sampling import check_sampling, draw_rows, find_begin, find_ends
from tools.team.worker import hash_weights
from tools.texts.windows import find_bos
from tools.texts.written import BATCH, MOST_DEGENERATE, find_source, take_fresh
from tools.workbench.store import Index


class Begin(NamedTuple):
    """What documents begin with."""

    ids: list[int]
    """All tokens that the model is given."""
    kept: list[int]
    """Those of them that are part of the text."""


class Author:
    """The dense model as the author of texts; called as `tools.texts.written.WrittenText` says.

    What it writes depends on its weights, on split, prompts and number of tokens, and on seed, window and text_cut of
    the settings, on nothing else. Documents are as long as a window, or as what is still missing where that is less,
    and no longer than the model's positions; each ends before a token that ends a text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: WorkbenchSettings, index: Index, progress: Progress
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._index, self._progress = index, progress
        self._weights = ""
        self._cache: bool | None = None

    def __call__(self, split: str, prompts: Sequence[str], tokens: int) -> list[int]:
        """The tokens of documents, of each prompt in turn, each followed by an empty line, as those of other sources.

        Documents that repeat themselves or one another are thrown away, and others drawn by the seeds that follow.
        Raises DegenerateText where those are most of them, UserError where the model cannot be sampled.
        """
        self._weights = self._weights or hash_weights(self._model)
        begins, gap, label = [self._begin(prompt) for prompt in prompts or [""]], self._find_gap(), f"write {split}"
        ids: list[int] = []
        said: set[tuple[int, ...]] = set()
        drawn = dropped = batch = 0
        self._progress(label, 0, tokens)
        while len(ids) < tokens:
            for kept, document in self._write_batch(split, begins, batch, len(ids), tokens):
                drawn += 1
                fresh = take_fresh(document, said)
                dropped += not fresh
                ids += [*kept, *document, *gap] if fresh else []
            if drawn >= BATCH and dropped > MOST_DEGENERATE * drawn:
                source = find_source(self._settings, split)
                raise DegenerateText(
                    f"the {split} text that the model wrote itself ({source!r}) came out degenerate: {dropped} of "
                    f"{count(drawn, 'document')} repeat themselves or one another; use another source of text, such as "
                    "hub:, file: or pydoc, or other prompts"
                )
            batch += 1
        self._progress(label, tokens, tokens)
        return ids

    def _write_batch(
        self, split: str, begins: Sequence[Begin], batch: int, have: int, tokens: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """(kept part of its prompt, what the model wrote) of as many documents as are missing, or as fit a batch."""
        share = -(-(tokens - have) // len(begins))
        length = min(self._settings.window, share)
        rows = min(max(1, BATCH // len(begins)), -(-share // length))
        found = []
        for begin in begins:
            new = min(length, self._find_room(begin))
            found.append(self._write_rows([split, str(batch)], begin, rows, new, have, tokens))
            have += rows * new
        for documents in zip(*found, strict=True):
            yield from zip((begin.kept for begin in begins), documents, strict=True)

    def _write_rows(
        self, which: list[str], begin: Begin, rows: int, new: int, have: int, tokens: int
    ) -> list[list[int]]:
        """Documents behind one beginning, from disk where they were written before; progress from `have` tokens on."""
        settings = self._settings
        shape = json.dumps([begin.ids, rows, new, settings.window, settings.seed, settings.text_cut, tokens])
        key = ["written by the model", self._weights, *which, shape]
        steps, began = 0, 0.0

        def tick() -> None:
            nonlocal steps, began
            heed_stop()
            began = began or time.monotonic()  # not before the model's first step, which reads the beginning
            passed = time.monotonic() - began
            rate = f"{FIGURES}{steps * rows / passed:,.0f} tokens/s" if passed else ""
            self._progress(f"write {which[0]}{rate}", min(have + steps * rows, tokens - 1), tokens)
            steps += 1

        def draw() -> dict[str, Any]:
            if self._cache is None:
                self._cache = check_sampling(self._model, begin.ids[:BATCH])
            seed = int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:7])
            ends = find_ends(self._model, self._tokenizer)
            with explain_work(f"writing {which[0]} text", BrokenBaseline):
                made = draw_rows(self._model, begin.ids, rows, new, seed, ends=ends, cache=self._cache, tick=tick)
            return {"documents": made}

        documents: list[list[int]] = self._index.measure_once(key, draw)["documents"]
        return documents

    # --- what documents begin and end with --------------------------------------------------------------------------

    def _begin(self, prompt: str) -> Begin:
        """Rendered once: a template may name the day."""
        found = self._index.measure_once(
            ["beginning", self._weights, prompt], lambda: self._encode(prompt)._asdict() if prompt else self._nothing()
        )
        return Begin(**found)

    def _nothing(self) -> dict[str, list[int]]:
        return {"ids": [find_begin(self._model, self._tokenizer)], "kept": []}

    def _encode(self, prompt: str) -> Begin:
        """A prompt is a user's turn where there is a template, and no part of the text; else it begins the text."""
        tokenizer = self._tokenizer
        if getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": prompt}]
            try:
                asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template may be any program
                raise UserError(f"the model's chat template failed on a prompt: {in_one_line(error, 200)}") from error
            return Begin(tokenizer(asked, add_special_tokens=False)["input_ids"], [])
        bos, ids = find_bos(tokenizer), tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return Begin(ids if bos is None else [bos, *ids], ids)

    def _find_room(self, begin: Begin) -> int:
        """Tokens that fit behind a beginning."""
        positions = count_positions(self._model)
        room = self._settings.window if positions is None else positions - len(begin.ids)
        if room < 1:
            raise UserError(
                f"a prompt of {len(begin.ids)} tokens leaves nothing of the model's {positions} positions to write in; "
                "give a shorter one"
            )
        return room

    def _find_gap(self) -> list[int]:
        """The tokens of the empty line behind a document."""
        word, line = (self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a\n\n"))
        return list(line[len(word) :])
