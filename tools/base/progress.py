"""How far a step is, and what went wrong without stopping it, told to whoever shows it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all)."""

Warn = Callable[[str], None]
"""Called with one sentence."""


class Warner:
    """Tells a warning to whoever listens at the moment; several may hold one."""

    def __init__(self, tell: Warn) -> None:
        self.tell = tell

    def __call__(self, text: str) -> None:
        """As `Warn`."""
        self.tell(text)


def ignore_progress(label: str, done: int, total: int) -> None:
    """Tell nobody."""


def count_up(progress: Progress, label: str, total: int) -> Callable[[int], None]:
    """A tick for so many steps more, which tells the progress."""
    done = 0

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        progress(label, done, total)

    progress(label, 0, total)
    return tick
