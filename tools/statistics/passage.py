"""How far the windows of a calibration text have come through the blocks, and who keeps it of a walk that is killed."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from tools.base.settings import Calibration
from tools.models.unfinished import States, hold_states
from tools.statistics.gradients import Gradient, Seen
from tools.statistics.shards import Span, StateStack, Sums

Purpose = Literal["profile", "moments", "pruning"]
"""Why a text walks up: to come back, for the moments alone, or through blocks that change before it passes them."""


def mark_text(text: int) -> str:
    """What the names of layers begin with in sums over one text of several; no layer's name has a space."""
    return f"{text} "


class Walk(NamedTuple):
    """One walk through a calibration text."""

    number: int
    text: Calibration
    shares: tuple[float, ...] = ()
    """What the windows of each text count, in sum 1, where the text is several, one after another and equally long:
    moments are then over so much of each window, and what flows back is summed up for each text apart (`mark_text`).
    Those that count nothing are not walked."""

    def find_share(self, window: int, windows: int) -> float:
        """What one of so many windows counts."""
        return self.shares[window * len(self.shares) // windows] if self.shares else 1.0

    def mark(self, window: int, windows: int) -> str:
        """What the names of sums begin with that are of one of so many windows."""
        return mark_text(window * len(self.shares) // windows) if self.shares else ""

    def flows(self, window: int, windows: int, gradient_windows: int) -> bool:
        """Whether gradients flow back through one of so many windows; `gradient_windows` of each text do."""
        return window % (windows // max(len(self.shares), 1)) < gradient_windows


def split_texts(sums: Sums, walk: Walk) -> list[Sums]:
    """The sums of each text of several that counts, without its mark; all where there is one."""
    if not walk.shares:
        return [sums]
    parts: list[Sums] = [{} for _ in walk.shares]
    for key, value in sums.items():
        kind, _, marked = key.partition("/")
        text, _, name = marked.partition(" ")
        parts[int(text)][f"{kind}/{name}"] = value
    return [part for part, share in zip(parts, walk.shares, strict=True) if share]


class Stack(Protocol):
    """Lists of tensors, of which the last one put there is the first that is taken; bytes come back as they were."""

    @property
    def height(self) -> int:
        """How many lists lie on it."""

    def push(self, states: Sequence[Tensor]) -> None:
        """Put the states of one block on top."""

    def pop(self) -> list[Tensor]:
        """Take what was put on top last, on CPU."""


@dataclass
class Passage:
    """How far one span of shards has come."""

    states: States
    """What the next block up reads, by window; on CPU (`hold_states`)."""
    up: int = 0
    """The next block up."""
    inputs: Stack | None = None
    """What every block read of the gradient windows, the last block's on top."""
    down: int | None = None
    """The next block down; None on the way up."""
    above: dict[int, tuple[Gradient, ...]] = field(default_factory=dict)
    """Gradients of that block's output, by window; on CPU."""
    seen: dict[int, Seen] = field(default_factory=dict)
    """What is held of the blocks that were passed last."""


class KeptPassages(Protocol):
    """Whoever keeps how far a walk has come, all but what is seen of blocks, so that one that was killed goes on there.

    `key` says which text is walked, and what is drawn, at its end which span; weights are those in the model.
    """

    def begin_stack(self, key: Sequence[str]) -> Stack:
        """An empty one, for what blocks read on a walk that comes back."""

    def read(self, key: Sequence[str]) -> Passage | None:
        """What was kept; None where there is nothing, or it is of other weights."""

    def keep(self, key: Sequence[str], passage: Passage) -> None:
        """Keep it in the place of what was kept before: all that was asked about earlier blocks is known."""

    def forget(self, key: Sequence[str]) -> None:
        """All is done, and kept elsewhere."""


class Passages:
    """Those that are under way, by the walk and the span."""

    def __init__(self, model: Any, scratch: Path, kept: KeptPassages | None) -> None:
        """Of texts that walk up through a model. Files without a name lie in the directory `scratch`."""
        self._model, self._scratch, self._kept = model, scratch, kept
        self._held: dict[tuple[int, Span], Passage] = {}
        self._keys: dict[tuple[int, Span], list[str]] = {}
        self.source: list[str] = []
        """What names the text of the walk under way, and what is drawn of it; empty where nothing is kept."""

    @property
    def keeps(self) -> bool:
        """Whether anything outlives this process."""
        return self._kept is not None

    def get(self, span: Span, walk: Walk) -> Passage | None:
        """That of a span, if it was begun."""
        return self._held.get((walk.number, span))

    def begin(self, span: Span, walk: Walk, states: States, returns: bool) -> Passage:
        """One before the first block, in the place of another of the span."""
        key, stack = self._claim(span, walk, returns), None
        if returns:
            stack = self._kept.begin_stack(key) if self._kept and key else StateStack(self._scratch)
        passage = self._held[walk.number, span] = Passage(states, inputs=stack)
        return passage

    def find_up(self, span: Span, walk: Walk, windows: Collection[int], block: int, returns: bool) -> Passage | None:
        """What was kept of windows on their way up, if they stand before `block` at most."""
        passage = self._read(span, walk, returns)
        if passage is None or passage.down is not None or passage.up > block:
            return None
        if not passage.states.keys() >= set(windows):
            return None
        passage.states = hold_states(self._model, [*windows], passage.states.__getitem__)
        self._held[walk.number, span] = passage
        return passage

    def find_down(self, span: Span, walk: Walk, block: int, losses: int) -> Passage | None:
        """What was kept on the way down with the gradients of so many losses, if `block` is still to be passed."""
        passage = self._read(span, walk, True)
        if passage is None or passage.down is None or passage.down < block:
            return None
        if any(len(above) != losses for above in passage.above.values()):
            return None
        self._held[walk.number, span] = passage
        return passage

    def keep(self, span: Span, walk: Walk, passage: Passage) -> None:
        """As in `KeptPassages`."""
        if self._kept and (key := self._keys.get((walk.number, span))):
            self._kept.keep(key, passage)

    def finish(self, walk: Walk, *, whole: bool) -> None:
        """Let go of those of a walk; what is kept of one that is not `whole` stays."""
        self._held = {place: passage for place, passage in self._held.items() if place[0] != walk.number}
        for place in [place for place in self._keys if place[0] == walk.number]:
            key = self._keys.pop(place)
            if whole and self._kept:
                self._kept.forget(key)

    def _read(self, span: Span, walk: Walk, returns: bool) -> Passage | None:
        key = self._claim(span, walk, returns)
        return self._kept.read(key) if self._kept and key else None

    def _claim(self, span: Span, walk: Walk, returns: bool) -> list[str]:
        """What that of a span is kept under; empty where another that is under way goes by the same."""
        if self._kept is None:
            return []
        key = [*self.source, json.dumps([*walk[1:], returns]), "{}-{}".format(*span)]
        if key in [other for place, other in self._keys.items() if place != (walk.number, span)]:
            return []
        self._keys[walk.number, span] = key
        return key
