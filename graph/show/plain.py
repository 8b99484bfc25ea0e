"""A run in plain lines, for pipes and logs."""

from collections.abc import Callable

from rich.console import Console

from graph.show.lines import ask_line, print_line
from graph.show.words import UNEXPECTED, Event, tell, tell_unknown
from tools.base.progress import name_step
from tools.base.words import clean, show_seconds

Clock = Callable[[], float]


class PlainDisplay:
    """Plain lines, one per event, for pipes and logs."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self.console = console
        self.clock = clock
        self.begun: dict[str, float] = {}

    def show(self, event: Event) -> None:
        """Print the lines of one event."""
        if event.get("type") == "node":
            self.begun.clear()  # a step that was cut short begins anew
        text = self.tell_progress(event) if event.get("type") == "progress" else tell(event)
        for line in text.splitlines():
            print_line(self.console, line)

    def ask(self, question: Event) -> str:
        """Ask beneath the lines so far."""
        return ask_line(self.console, question)

    def tell_progress(self, event: Event) -> str:
        """A line when a step begins and one when it ends; nothing for the ticks between."""
        now = self.clock()
        try:
            label, done, total = clean(event["label"], 60), int(event["done"]), int(event["total"])
            step = name_step(label)
        except UNEXPECTED:
            return tell_unknown(event)
        if done >= total:
            return f"{label}: {total:,} of {total:,} in {show_seconds(now - self.begun.pop(step, now))}"
        if step in self.begun:
            return ""
        self.begun[step] = now
        return f"{label}: {done:,} of {total:,}"
