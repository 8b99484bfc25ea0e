"""How far a step is, and what went wrong without stopping it, told to whoever shows it; and who may stop it.

Long work asks at every boundary whether it is to end there: before each layer, and before each window of text.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all); the first may end with figures, behind `FIGURES`."""

FIGURES = " · "
"""Parts what is going on from figures that change as it goes: a step is known by what stands before it."""


def name_step(label: str) -> str:
    """What is going on, without its figures."""
    return label.partition(FIGURES)[0]


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


_stop: ContextVar[Event | None] = ContextVar("stop", default=None)


class Stopped(RuntimeError):
    """The work was asked to end, and did before its next layer or window of text; what is on disk stands."""


@contextmanager
def stop_at(asked: Event) -> Iterator[None]:
    """What is begun inside, in threads of this context too, ends by `Stopped` once the event is set."""
    token = _stop.set(asked)
    try:
        yield
    finally:
        _stop.reset(token)


def heed_stop() -> None:
    """Between two layers or windows: raises Stopped where the work was asked to end."""
    asked = _stop.get()
    if asked is not None and asked.is_set():
        raise Stopped("stopped as asked, before the next layer or window of text")


def count_up(progress: Progress, label: str, total: int) -> Callable[[int], None]:
    """A tick for so many steps more, which tells the progress."""
    done = 0

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        progress(label, done, total)

    progress(label, 0, total)
    return tick
