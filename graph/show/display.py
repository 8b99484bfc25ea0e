"""Shows a run as it goes: lines of what happens, and on a terminal the bars of what is under way beneath them."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from graph.show.words import UNEXPECTED, Event, tell, tell_unknown
from tools.base.progress import name_step
from tools.base.words import clean, show_compact, show_seconds, strip_controls

Clock = Callable[[], float]

STYLES = {
    **{"plan": "cyan", "lesson": "magenta", "accept": "green", "rollback": "red"},
    **dict.fromkeys(("warning", "parting", "request"), "yellow"),
}
"""Of the lines of an event, by its type."""

HINTS = {
    "plan": 'accept, refuse WHY, or what to change, such as {"sparsity": 0.3}: ',
    "brief": 'accept, or what to change, such as {"probes": ["def parse_csv("]}: ',
}
"""What may be answered to a plan, and to what was made of a goal."""


class Display(Protocol):
    """Whatever shows a run."""

    def show(self, event: Event) -> None:
        """Show one event of the run."""

    def ask(self, question: Event) -> str:
        """Show a plan that waits for a person, and read a line. Raises EOFError when there is none to come."""


@contextmanager
def open_display(console: Console, *, live: bool | None = None, clock: Clock = time.monotonic) -> Iterator[Display]:
    """Show a run on `console`; `live=None` draws bars wherever they can be drawn."""
    if live is None:
        live = console.is_terminal and console.is_interactive and console.encoding.startswith("utf")
    if not live:
        yield PlainDisplay(console, clock)
        return
    display = LiveDisplay(console, clock)
    try:
        yield display
    finally:
        display.bars.stop()


class PlainDisplay:
    """Plain lines, for pipes and logs."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self.console, self.clock = console, clock
        self.begun: dict[str, float] = {}

    def show(self, event: Event) -> None:
        """Print the lines of one event."""
        if event.get("type") == "node":
            self.begun.clear()  # a step that was cut short begins anew
        self.print(self.tell_progress(event) if event.get("type") == "progress" else tell(event))

    def print(self, text: str, style: str = "") -> None:
        """Print lines, each as it is."""
        for line in text.splitlines():
            print_line(self.console, line, style)

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


class LiveDisplay(PlainDisplay):
    """Lines in colour, and beneath them the bars of what is under way."""

    def __init__(self, console: Console, clock: Clock) -> None:
        super().__init__(console, clock)
        self.bars, self.tasks = self._make_bars(), dict[str, TaskID]()
        self.bars.start()

    def show(self, event: Event) -> None:
        """Print the lines of one event, and move its bar."""
        kind = str(event.get("type"))
        if kind == "progress":
            told = self.tell_progress(event)
            try:
                shown = self._move(name_step(clean(event["label"], 60)), int(event["done"]), int(event["total"]))
            except UNEXPECTED:
                shown = False
            self.print("" if shown else told)
            return
        if kind in ("node", "result", "stopped"):
            self._clear()
        self.print(tell(event), STYLES.get(kind, ""))

    def ask(self, question: Event) -> str:
        """Ask in the bars' place, and draw new ones beneath."""
        self._clear()
        self.bars.stop()
        try:
            return ask_line(self.console, question)
        finally:
            self.bars = self._make_bars()  # those that were stopped still know where they stood
            self.bars.start()

    def _move(self, step: str, done: int, total: int) -> bool:
        """Move a step's bar, or take it away at its end; whether there is one."""
        if done >= total:
            if step in self.tasks:
                self.bars.remove_task(self.tasks.pop(step))
            return False
        if step not in self.tasks:
            self.tasks[step] = self.bars.add_task(step, total=total)
        self.bars.update(self.tasks[step], completed=done, total=total)
        return True

    def _clear(self) -> None:
        for task in self.tasks.values():
            self.bars.remove_task(task)
        self.tasks.clear()

    def _make_bars(self) -> Progress:
        """Bars with the time left, judged over the whole step: its ticks may be a minute apart."""
        return Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            speed_estimate_period=86400,
            get_time=self.clock,
        )


def print_line(console: Console, line: str, style: str = "") -> None:
    """Print one line, unwrapped, with what the stream cannot encode as backslash escapes."""
    line = strip_controls(line).encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(Text(line, style), soft_wrap=True)


def ask_line(console: Console, question: Event) -> str:
    """Show a plan with what it is predicted to do, or what was made of a goal; and read what a person says to it."""
    asked = "plan" if "plan" in question else "brief"
    if asked == "plan":
        print_line(console, f"plan {question['iteration']}: {clean(question['line'])}")
        if question["predicted_kl"] is not None:
            print_line(console, f"  predicted KL {show_compact(question['predicted_kl'], 4)} nats per token")
    else:
        print_line(console, f"goal: {clean(question['goal'], 2000)}")
        print_line(console, f"  comes to: {clean(question['line'])}")
    if question.get("reason"):
        print_line(console, f"  because: {clean(question['reason'], 1000)}")
    fields = {name: value for name, value in question[asked].items() if name != "reason"}
    print_line(console, f"  as JSON: {clean(json.dumps(fields, ensure_ascii=False), 10_000)}")
    if question.get("problem"):
        print_line(console, f"  that cannot be used: {clean(question['problem'], 1000)}")
    with redirect_stdout(console.file):  # the terminal's own, where lines can be edited
        return console.input(Text(HINTS[asked]))
