"""How far a step is, told to whoever shows it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all)."""


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
