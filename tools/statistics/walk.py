"""One walk through a calibration text, as plain data: which text, and what its windows count."""

from typing import Literal, NamedTuple

from tools.base.settings import Calibration
from tools.statistics.shards import Sums

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
