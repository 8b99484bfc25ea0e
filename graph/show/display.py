"""Shows a run as it goes: a live picture on a terminal, plain lines everywhere else.

A display is fed dict events through `show` and knows nothing else of the run, so a run that was
recorded (`events.jsonl`) is shown by the same code: see `graph.show.svg`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from graph.show.above import print_above
from graph.show.lines import ask_line, print_line
from graph.show.picture import Picture
from graph.show.plain import Clock, PlainDisplay
from graph.show.words import SHOWN, UNEXPECTED, Event, tell, tell_unknown
from tools.base.words import strip_controls

REFRESH_PER_SECOND = 4  # at most: the picture is drawn beside a busy CPU


class Display(Protocol):
    """Whatever shows a run."""

    def show(self, event: Event) -> None:
        """Show one event of the run."""

    def ask(self, question: Event) -> str:
        """Show a plan that waits for a person, and read a line. Raises EOFError when there is none to come."""


@contextmanager
def open_display(
    console: Console, *, name: str, target: float, live: bool | None = None, clock: Clock = time.monotonic
) -> Iterator[Display]:
    """Show the run `name` on `console`; `live=None` draws the live picture wherever it can be drawn."""
    if live is None:
        live = console.is_terminal and console.is_interactive and console.encoding.startswith("utf")
    if not live:
        yield PlainDisplay(console, clock)
        return
    display = LiveDisplay(console, name, target, clock)
    try:
        display.live.start(refresh=True)
        try:
            with print_above(console):
                try:
                    yield display
                finally:
                    display.picture.last = True  # what stays on the screen may be taller than the screen
        finally:
            display.live.stop()
    finally:
        for line in display.closing:
            print_line(console, line)


class LiveDisplay:
    """The live picture; warnings, and events it cannot draw, are printed above it and stay."""

    def __init__(self, console: Console, name: str, target: float, clock: Clock) -> None:
        self.console = console
        self.picture = Picture(name, target, clock)
        self.closing: list[str] = []
        self.live = self.make_live()

    def make_live(self) -> Live:
        """The picture on the screen; redirection is left to print_above, which takes all as it is."""
        return Live(
            self.picture,
            console=self.console,
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def ask(self, question: Event) -> str:
        """Ask in the picture's place, and draw it again beneath."""
        self.live.transient = True
        self.live.stop()
        try:
            return ask_line(self.console, question)
        finally:
            self.live = self.make_live()  # one that was stopped still knows where its picture stood
            self.live.start(refresh=True)

    def show(self, event: Event) -> None:
        """Change the picture; it is drawn when its time comes."""
        kind = str(event.get("type"))
        above = tell(event) if kind == "warning" or kind not in SHOWN else ""
        try:
            self.picture.take(event)
        except UNEXPECTED:
            above = tell_unknown(event)
        if kind in ("result", "stopped"):
            self.closing = tell(event).splitlines()
        if above:  # printed outside the picture's lock: rich takes its own first, then the picture's
            self.console.print(Text(strip_controls(above), style="yellow"))
