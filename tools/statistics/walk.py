"""One walk through a calibration text, as plain data: which text, and what its windows count."""

from typing import Literal, NamedTuple

from tools.base.settings import Calibration

Purpose = Literal["profile", "moments", "pruning"]
"""Why a text walks up: to come back, for the moments alone, or through blocks that change before it passes them."""


class Walk(NamedTuple):
    """One walk through a calibration text."""

    number: int
    text: Calibration
    every: bool = False
    """Whether gradients flow back through every window, and not the gradient windows alone."""
    shares: tuple[float, ...] = ()
    """What the windows of each text count, in sum 1, where the text is several, one after another and equally long:
    sums are then over so much of each window. Those that count nothing are not walked."""

    def find_share(self, window: int, windows: int) -> float:
        """What one of so many windows counts."""
        return self.shares[window * len(self.shares) // windows] if self.shares else 1.0

    def flows(self, window: int, windows: int, gradient_windows: int) -> bool:
        """Whether gradients flow back through one of so many windows; `gradient_windows` of each text do."""
        return self.every or window % (windows // max(len(self.shares), 1)) < gradient_windows
