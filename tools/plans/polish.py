"""What a polish goes through: which windows of the calibration text train it, step by step, and which are held out.

No torch.
"""

from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Literal, NamedTuple

from tools.base.errors import ImpossiblePlan

Means = Literal["fp32", "bf16"]
"""Number format of the two running means that the optimiser of a polish holds of each survivor."""

STEP_TOKENS = 512
"""Tokens whose mean KL one step goes by, in whole windows; one window where that is longer.

Small steps, for there are many of them: after 12,288 tokens, SmolLM2 at 60 % had a validation KL of 0.633 with steps of
512 and 0.684 with steps of 2,048, at the same rate; 0.840 before.
"""

HELD_OUT = 10
"""One window of so many trains nothing, and says when to stop."""

MEASURES = 4
"""How often in a pass the windows held out are measured."""

PATIENCE = 4
"""Measures in a row without a lower KL that end a polish: a pass of them."""


class Schedule(NamedTuple):
    """Windows, by their numbers in the calibration text."""

    steps: Sequence[Sequence[int]]
    """Those of each step."""
    held_out: Sequence[int]
    measured: Sequence[int]
    """Steps done when the windows held out are measured, ascending; they are measured once more before the first."""
    passes: Sequence[int]
    """Steps done at the end of each pass through the text."""

    def on(self, windows: Sequence[int]) -> "Schedule":
        """The same through others: `windows[i]` in place of window i."""
        steps = [[windows[i] for i in step] for step in self.steps]
        return self._replace(steps=steps, held_out=[windows[i] for i in self.held_out])

    @property
    def windows(self) -> list[int]:
        """All that are read, ascending."""
        return sorted({window for step in self.steps for window in step}.union(self.held_out))

    @property
    def trained(self) -> int:
        """Windows that train it, each as often as it does."""
        return sum(map(len, self.steps))

    @property
    def evaluated(self) -> int:
        """Windows held out, each as often as it is measured."""
        return len(self.held_out) * (1 + len(self.measured))

    def count_tokens(self, window: int) -> int:
        """Tokens put through the model, a backward pass as two forwards: the trained windows forward twice, for what
        blocks read is not held, and backward; those held out forward at each measure; all by the dense model once.
        """
        return window * (4 * self.trained + self.evaluated + len(self.windows))


def schedule_polish(windows: int, window: int, tokens: int, seed: int) -> Schedule:
    """The schedule of `tokens` tokens, rounded down to whole windows, through a text of so many windows.

    Every tenth window is held out. More tokens than the others have are several passes, fewer are their first ones;
    each pass has an order of its own, by the seed. Raises ImpossiblePlan where the text is one window, or the tokens
    are less than one.
    """
    if windows < 2:
        raise ImpossiblePlan("polish holds calibration windows out, and there is one; give --calibration-windows 2")
    if tokens < window:
        raise ImpossiblePlan(f"polish on {tokens:,} tokens is less than one window of {window:,}; give it more")
    count = max(1, windows // HELD_OUT)
    held_out = [(2 * i + 1) * windows // (2 * count) for i in range(count)]
    training = [number for number in range(windows) if number not in held_out]
    whole, rest = divmod(tokens // window, len(training))
    parts = [training] * whole + [training[:rest]] * (rest > 0)
    shuffled = [Random(f"polish {seed} {number}").sample(part, len(part)) for number, part in enumerate(parts)]
    passes = [_cut_evenly(part, max(1, STEP_TOKENS // window)) for part in shuffled]
    ends = list(accumulate(map(len, passes)))
    starts = [0, *ends[:-1]]
    measured = [end for start, steps in zip(starts, passes, strict=True) for end in _list_measures(start, len(steps))]
    return Schedule([step for steps in passes for step in steps], held_out, measured, ends)


def _cut_evenly(windows: Sequence[int], most: int) -> list[Sequence[int]]:
    """As few pieces of at most so many windows as can be, and as even."""
    pieces, count = -(-len(windows) // most), len(windows)
    return [windows[count * i // pieces : count * (i + 1) // pieces] for i in range(pieces)]


def _list_measures(start: int, steps: int) -> list[int]:
    """Steps done when a pass of so many is measured; the last of them is its end."""
    times = min(MEASURES, steps)
    return [start + steps * i // times for i in range(1, times + 1)]
