"""Shows a run as it goes: a live picture on a terminal, plain lines everywhere else.

A display is fed dict events through `show` and knows nothing else of the run, so a run that was
recorded (`events.jsonl`) is shown by the same code: see `render_svg`.
"""

import io
import json
import logging
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.segment import Segment, SegmentLines
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from tools.base.words import clean, count, show_compact, show_percent, show_seconds, strip_controls
from tools.results.sentences import list_outcome

Event = Mapping[str, Any]
Clock = Callable[[], float]

REFRESH_PER_SECOND = 4  # at most: the picture is drawn beside a busy CPU
MAX_TRIALS = 12
MAX_BARS = 3
MAX_KINDS = 16
WIDE = 100  # columns from which the plan and the reason of a trial have a column each

LOOP = (
    "profile → plan → (approve) → prune → validate ─┬─ accept ───┐",
    "   ↑        ↑                                  └─ rollback ─┤",
    "   └────────┴────────────────── reflect ←───────────────────┘ → finish",
)
NODES = ("profile", "plan", "approve", "prune", "validate", "accept", "rollback", "reflect", "finish")
LIT = {"accept": "bold reverse green", "rollback": "bold reverse red"}
VERDICTS = {"accept": "green", "rollback": "red", "refuse": "yellow"}

# Viridis: even steps in lightness, so it reads in order for the colour-blind and in grey as well.
SHADES = (
    *((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140)),
    *((34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37)),
)


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


def render_svg(events: Iterable[Event], path: Path, width: int = 110) -> None:
    """Replay recorded events and write the last live picture, with the result beneath it, as an SVG.

    Events may carry their `time` in seconds; without it no time passes until the result says how much.
    """
    now = 0.0
    console = Console(
        file=io.StringIO(), record=True, width=width, height=100, color_system="truecolor", no_color=False,
        force_terminal=True, legacy_windows=False, _environ={},
    )  # fmt: skip
    display = LiveDisplay(console, "", 0.0, lambda: now)
    for event in events:
        if isinstance(event.get("time"), (int, float)):
            now = event["time"]
            display.picture.begun = display.picture.begun or now
        if event.get("type") in SHOWN:  # a recording holds more than a display is shown
            display.show(event)
    display.picture.last = True
    console.print(display.picture)
    for line in display.closing:
        console.print(Text(line))
    svg = console.export_svg(title=f"billhook {display.picture.name}".rstrip(), unique_id="billhook")
    # Some viewers drop the spaces at either end of a text unless they are told to keep them.
    path.write_text(svg.replace("<svg ", '<svg xml:space="preserve" ', 1), encoding="utf-8")


# Every event as plain lines -----------------------------------------------------------------------


def tell_start(event: Event) -> str:
    """The first line of a run."""
    verb = "resumed" if event.get("resumed") else "started"
    return (
        f"{verb} {clean(event['run'])}: {clean(event['model'])} to {show_percent(event['target'], 1)} sparsity, "
        f"planned by {clean(event['planner'])}, in {clean(event['directory'], 1000)}"
    )


def tell_profile(event: Event) -> str:
    """What was profiled, and the layers that are dearest to prune."""
    top = ", ".join(f"{clean(name, 100)} {show_compact(kl, 4)}" for name, kl in event["top"][:5])
    return f"profile: {count(event['layers'], 'layer')}, {count(event['weights'], 'weight')}; most precious: {top}"


def tell_layers(event: Event) -> str:
    """The range of the sparsities now in the model."""
    values = event["sparsity"]
    if not values:
        return "layers: none"
    least, most = show_percent(min(values), 1), show_percent(max(values), 1)
    return f"layers: {count(len(values), 'layer')}, sparsity {least} to {most}"


def tell_plan(event: Event) -> str:
    """A plan and why."""
    line = f"plan {event['iteration']} by {clean(event['planner'])}: {clean(event['plan'])}"
    line += f", predicted KL {show_compact(event['predicted_kl'], 4)}"
    return f"{line}: {clean(event['reason'], 1000)}" if event.get("reason") else line


def tell_reply(event: Event) -> str:
    """An answer of a planner's model, and what was wrong with it."""
    line = f"reply of {clean(event['planner'])}: {event['input_tokens']:,} tokens in, {event['output_tokens']:,} out"
    return f"{line}; handed back: {clean(event['problem'], 1000)}" if event.get("problem") else line


def tell_tool(event: Event) -> str:
    """What a planner looked up or tried out before its plan, and what it found."""
    return f"tool {event['iteration']}: {clean(event['tool'], 40)} {clean(event['shown'])}"


def tell_kl(event: Event) -> str:
    """0.2103 ± 0.0040"""
    error = "" if event["kl"] is None or event.get("kl_error") is None else f" ± {show_compact(event['kl_error'], 4)}"
    return show_compact(event["kl"], 4) + error


def tell_facts(event: Event) -> str:
    """, facts 91.2 % ± 0.8 %: what is left of the answers' probability; nothing where no questions were asked."""
    share, error = event.get("fact_retention"), event.get("fact_error")
    if share is None:
        return ""
    return f", facts {show_percent(share, 1)}" + (f" ± {show_percent(error, 1)}" if error is not None else "")


def tell_trial(event: Event) -> str:
    """A plan as measured."""
    if event["iteration"] == 0:
        return f"trial 0: the dense model, perplexity {show_compact(event['perplexity'])}"
    if event["verdict"] == "refuse":
        return f"trial {event['iteration']}: refused, {clean(event['plan'])}: {clean(event['reason'], 1000)}"
    line = (
        f"trial {event['iteration']}: {event['verdict']}, sparsity {show_percent(event['sparsity'], 1)}, "
        f"perplexity {show_compact(event['perplexity'])}, KL {tell_kl(event)} "
        f"(predicted {show_compact(event['predicted_kl'], 4)}){tell_facts(event)}, "
        f"{show_seconds(event.get('seconds', 0.0))}, {clean(event['plan'])}"
    )
    return f"{line}: {clean(event['reason'], 1000)}" if event.get("reason") else line


def tell_approval(event: Event) -> str:
    """What a person said to a plan."""
    said = {"accept": "accepted as it is", "edit": "accepted after an edit", "refuse": "refused"}[event["decision"]]
    line = f"approval {event['iteration']}: {said}"
    return f"{line}: {clean(event['reason'], 500)}" if event.get("reason") else line


def tell_rollback(event: Event) -> str:
    """Which weights came back."""
    layers = count(event["layers"], "layer")
    return f"rollback {event['iteration']}: {layers} restored to checkpoint {clean(event['checkpoint'], 80)}"


def tell_accept(event: Event) -> str:
    """Which weights stay."""
    return f"accept {event['iteration']}: checkpoint {clean(event['checkpoint'], 80)}"


def tell_lesson(event: Event) -> str:
    """What a trial taught."""
    figures = f"{clean(event['selector'])} × {event['factor']:.2f}"
    return f"lesson {event['iteration']}: {clean(event['text'], 1000) or figures}"


def tell_usage(event: Event) -> str:
    """What the agents have cost so far."""
    if not event["calls"]:
        return "agents: no calls"
    tokens = f"{event['input_tokens']:,} tokens in, {event['output_tokens']:,} out"
    return f"agents: {count(event['calls'], 'call')}, {tokens}, ${event['cost']:.4f}"


TELL: dict[str, Callable[[Event], str]] = {
    "start": tell_start,
    "node": lambda e: f"iteration {e['iteration']}: {clean(e['node'])}" if e.get("iteration") else clean(e["node"]),
    "profile": tell_profile,
    "layers": tell_layers,
    "plan": tell_plan,
    "approval": tell_approval,
    "reply": tell_reply,
    "tool": tell_tool,
    "trial": tell_trial,
    "rollback": tell_rollback,
    "accept": tell_accept,
    "lesson": tell_lesson,
    "lessons": lambda e: f"{count(e['count'], 'lesson')} from {count(e['runs'], 'earlier run')}",
    "usage": tell_usage,
    "note": lambda e: f"note: {clean(e['text'], 1000)}",
    "parting": lambda e: f"parts from the record at {clean(e['text'], 1000)}",
    "fork": lambda e: f"forked from {clean(e['from'], 100)} after iteration {e['iteration']}",
    "warning": lambda e: f"warning: {clean(e['text'], 1000)}",
    "result": lambda e: "\n".join(list_outcome(e)),
    "pushed": lambda e: f"pushed: {clean(e['url'], 1000)}",
    "stopped": lambda e: f"stopped: {clean(e['reason'], 1000)}\nresume with: {clean(e['resume'], 1000)}",
}

SHOWN = {*TELL, "progress"}
UNEXPECTED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def tell_unknown(event: Event) -> str:
    """An event nobody told the display about, or one that lacks a field: shown as it is."""
    return " ".join(f"{clean(key, 50)}={clean(value, 100)}" for key, value in event.items())


def tell(event: Event) -> str:
    """The plain lines of an event; an event of an unexpected shape is shown as it is and never ends a run."""
    try:
        return TELL[event["type"]](event)
    except UNEXPECTED:
        return tell_unknown(event)


def ask_line(console: Console, question: Event) -> str:
    """Show a plan with what it is predicted to do, and read what a person says to it."""
    print_line(console, f"plan {question['iteration']}: {clean(question['line'])}")
    print_line(console, f"  predicted KL {show_compact(question['predicted_kl'], 4)} nats per token")
    if question.get("reason"):
        print_line(console, f"  because: {clean(question['reason'], 1000)}")
    fields = {name: value for name, value in question["plan"].items() if name != "reason"}
    print_line(console, f"  as JSON: {clean(json.dumps(fields, ensure_ascii=False), 10_000)}")
    if question.get("problem"):
        print_line(console, f"  that cannot be used: {clean(question['problem'], 1000)}")
    with redirect_stdout(console.file):  # the terminal's own, where lines can be edited
        return console.input(Text('accept, refuse WHY, or what to change, such as {"sparsity": 0.3}: '))


def print_line(console: Console, line: str) -> None:
    """Print one line, neither wrapped nor coloured, with what the stream cannot encode as backslash escapes."""
    line = strip_controls(line).encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(Text(line), soft_wrap=True)


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
        except UNEXPECTED:
            return tell_unknown(event)
        if done >= total:
            return f"{label}: {total:,} of {total:,} in {show_seconds(now - self.begun.pop(label, now))}"
        if label in self.begun:
            return ""
        self.begun[label] = now
        return f"{label}: {done:,} of {total:,}"


# The parts of the live picture --------------------------------------------------------------------


def draw_loop(node: str, width: int) -> list[Text]:
    """The loop with the present node lit; a row of the nodes where the picture is too wide."""
    lines = LOOP if width >= len(LOOP[2]) else (" ".join(NODES[:4]), " ".join(NODES[4:]))
    drawn = [Text(line, style="bright_black", no_wrap=True) for line in lines]
    for line in drawn:
        line.highlight_words(NODES, "default")
        line.highlight_words([node] if node in NODES else [], LIT.get(node, "bold reverse cyan"))
    return drawn


_RULER = Console(file=io.StringIO(), _environ={})  # rich wraps text for a console, whichever it is


def fit(text: str, width: int, lines: int) -> list[Text]:
    """Wrap text to at most `lines` lines; what is cut ends in an ellipsis."""
    wrapped = list(Text(text).wrap(_RULER, width))
    kept = wrapped[:lines]
    for line in kept:
        line.rstrip()
    if len(wrapped) > lines:
        kept[-1].append("…")
        kept[-1].truncate(width, overflow="ellipsis")
    return kept


def trial_cells(trial: Event) -> list[str]:
    """The figures of a trial, as strings, one per column of TRIAL_COLUMNS."""
    number = trial["iteration"]
    cells = [str(number), show_percent(trial["sparsity"], 1), show_compact(trial["perplexity"])]
    if number == 0:
        return [*cells, "", "", "", "dense"]
    if trial["verdict"] == "refuse":
        return [*cells[:2], "", "", show_compact(trial["predicted_kl"], 4), "", "refuse"]
    facts = "" if trial.get("fact_retention") is None else show_percent(trial["fact_retention"], 1)
    kl = tell_kl(trial).replace("± ", "±")
    return [*cells, kl, show_compact(trial["predicted_kl"], 4), facts, clean(trial["verdict"], 8)]


TRIAL_COLUMNS = ("#", "sparsity", "ppl", "KL ± error", "pred.", "facts", "verdict")


def draw_trials(trials: Sequence[Event], width: int, shown: int, lines: int) -> Table:
    """The last `shown` trials, with the dense model first; plan and reason have `lines` lines each."""
    rest = trials[len(trials) - shown + 1 :] if len(trials) > shown else trials[1:]
    skipped = len(trials) - 1 - len(rest)
    asked = any(trial.get("fact_retention") is not None for trial in trials)
    keep = [i for i, head in enumerate(TRIAL_COLUMNS) if head != "facts" or asked] if width >= 70 else [0, 1, 2, 6]
    rows = [[cells[i] for i in keep] for cells in map(trial_cells, (trials[0], *rest))]
    used, columns = 0, []
    for place, head in enumerate(TRIAL_COLUMNS[i] for i in keep):
        columns.append(Column(head, justify="left" if head == "verdict" else "right", no_wrap=True, overflow="crop"))
        used += max(len(head), *(len(row[place]) for row in rows)) + 1
    left = max(width - used, 8)
    widths, heads = [left], ["plan, reason"]
    if width >= WIDE:
        plan = min(max(len("plan"), *(len(clean(trial.get("plan", ""))) for trial in trials)), left // 2)
        widths, heads = [plan, left - plan - 1], ["plan", "reason"]
    heads[-1] += f" ({skipped} earlier hidden)" if skipped else ""
    columns += [Column(head, width=w, no_wrap=True) for head, w in zip(heads, widths, strict=True)]
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for trial, cells in zip((trials[0], *rest), rows, strict=True):
        words = [clean(trial.get("plan", "")), clean(trial.get("reason", ""))]
        if len(widths) == 2:
            texts = [fit(word, w, lines) for word, w in zip(words, widths, strict=True)]
        elif lines > 1:
            both = zip(words, (1, lines - 1), strict=True)
            texts = [[line for word, most in both if word for line in fit(word, left, most)]]
        else:
            texts = [fit(" · ".join(word for word in words if word), left, 1)]
        style = "" if trial["iteration"] == 0 else VERDICTS.get(trial["verdict"], "")
        table.add_row(*cells, *(Text("\n").join(text) for text in texts), style=style)
    return table


@dataclass
class Strip:
    """Sparsity by kind of layer (rows) and block (columns)."""

    blocks: list[int]
    rows: dict[str, dict[int, float]]
    hidden: int
    least: tuple[float, str]
    most: tuple[float, str]


def make_strip(event: Event) -> Strip:
    """Sort layers into rows and columns; experts of one block share a cell, which shows their mean."""
    kinds = [re.sub(r"\b\d+\b", "*", clean(kind, 200)) for kind in event["kinds"]]
    labels = shorten_kinds(list(dict.fromkeys(kinds)))
    cells: dict[str, dict[int, list[float]]] = {}
    ranked: list[tuple[float, str]] = []
    for _, block, kind, value in zip(event["names"], event["blocks"], kinds, event["sparsity"], strict=True):
        if not 0 <= value <= 1:
            raise ValueError(f"a sparsity of {value}")
        cells.setdefault(labels[kind], {}).setdefault(int(block), []).append(value)
        ranked.append((value, f"{block} {labels[kind]}"))
    return Strip(
        blocks=sorted({int(block) for block in event["blocks"]}),
        rows={label: {b: fmean(v) for b, v in row.items()} for label, row in list(cells.items())[:MAX_KINDS]},
        hidden=max(len(cells) - MAX_KINDS, 0),
        least=min(ranked),
        most=max(ranked),
    )


def shorten_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """Each kind by as many of its last parts as tell them all apart: `self_attn.q_proj` → `q_proj`."""
    for parts in range(1, 10):
        short = [".".join(kind.split(".")[-parts:]) for kind in kinds]
        if len(set(short)) == len(kinds):
            return dict(zip(kinds, short, strict=True))
    return {kind: kind for kind in kinds}


@lru_cache(maxsize=101)
def shade(hundredths: int) -> Style:
    """The colour of a sparsity."""
    place = min(max(hundredths, 0), 100) / 10
    low = min(int(place), 9)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(SHADES[low], SHADES[low + 1], strict=True))
    return Style(bgcolor=f"#{red:02x}{green:02x}{blue:02x}")


def draw_cell(value: float | None, size: int, coloured: bool) -> tuple[str, Style | str]:
    """One layer: its colour, or the tenths of its sparsity; a point when nothing was pruned."""
    if value is None:
        return " " * size, ""
    if value == 0:
        return "·".ljust(size), "bright_black"
    return (" " * size, shade(round(100 * value))) if coloured else (str(min(int(10 * value), 9)).ljust(size), "")


def strip_shape(strip: Strip, width: int) -> tuple[int, int, int]:
    """Columns for the labels, columns for a cell, cells in a row, such that all blocks fit or wrap."""
    label = min(max(len("block"), *(len(name) for name in strip.rows)), max(width // 3, 5))
    room = max(width - label - 1, 1)
    size = min(max(room // len(strip.blocks), 1), 3)
    return label, size, min(room // size, len(strip.blocks))


def count_strip_lines(strip: Strip, width: int) -> int:
    """How many lines `draw_strip` will return."""
    per_row = strip_shape(strip, width)[2]
    return -(-len(strip.blocks) // per_row) * (len(strip.rows) + 1) + 1


def draw_strip(strip: Strip, width: int, coloured: bool) -> list[Text]:
    """A cell per layer, a row per kind, wrapped by blocks; the last line explains the scale."""
    label, size, per_row = strip_shape(strip, width)
    lines = []
    for start in range(0, len(strip.blocks), per_row):
        blocks = strip.blocks[start : start + per_row]
        marks = "".join(str(block).ljust(5 * size)[: 5 * size] for block in blocks[::5] if len(str(block)) < 5 * size)
        head = Text("block".rjust(label) + " ", style="bright_black", no_wrap=True)
        lines.append(head.append(marks[: max(len(blocks) * size, 1)]))
        for name, row in strip.rows.items():
            line = Text(name[-label:].rjust(label) + " ", no_wrap=True)
            for block in blocks:
                line.append(*draw_cell(row.get(block), size, coloured))
            lines.append(line)
    return [*lines, draw_scale(strip, label, width, coloured)]


def draw_scale(strip: Strip, label: int, width: int, coloured: bool) -> Text:
    """What the colours mean, and the least and the most pruned layer."""
    line = Text("sparsity".rjust(label) + " ", style="bright_black", no_wrap=True)
    if coloured:
        line.append("0% ")
        for hundredths in range(0, 101, 5 if width >= WIDE else 10):
            line.append(" ", style=shade(hundredths))
        line.append(" 100%")
    else:
        line.append("in tenths, · untouched")
    for word, (value, layer) in (("least", strip.least), ("most", strip.most)):
        line.append(f"  {word} {show_percent(value, 0)} ({layer})")
    if strip.hidden:
        line.append(f"  {count(strip.hidden, 'kind')} not shown")
    line.truncate(width, overflow="ellipsis")
    return line


@dataclass
class Saying:
    """Something an agent, or the run, said."""

    who: str
    text: str
    style: str = ""


def draw_sayings(sayings: Iterable[Saying], width: int, rows: int) -> list[Text]:
    """The latest words in at most `rows` lines, the newest last and whole before older ones get room."""
    lines: list[Text] = []
    for saying in reversed(list(sayings)):
        room = rows - len(lines)
        if room <= 0:
            break
        words = fit(saying.text, max(width - 13, 10), min(room, 4))
        block = []
        for i, part in enumerate(words):
            line = Text(no_wrap=True).append(("" if i else saying.who).ljust(13), saying.style or "cyan")
            block.append(line.append_text(part))
        lines = [*block, *lines]
    return lines


def share_rows(room: int, trials: int, strip: int) -> tuple[int, bool, int]:
    """Share the lines of the screen: how many for trials, whether to draw the strip, how many for sayings."""
    strip_fits = room - strip >= 6  # the table's head, three trials, two lines of words
    room -= strip if strip_fits else 0
    for_trials = min(trials, max(room - 3, 2)) if trials else 0
    return for_trials, strip_fits, max(min(room - for_trials - 1, 6), 1)


# The live picture ---------------------------------------------------------------------------------


class Picture:
    """Everything that the live picture shows, taken from events and drawn to the size of the screen."""

    def __init__(self, name: str, target: float, clock: Clock) -> None:
        self.name, self.target, self.model, self.planner = clean(name, 40), target, "", ""
        self.clock, self.begun, self.seconds = clock, clock(), -1.0
        self.node, self.iteration = "", 0
        self.trials: dict[int, dict[str, Any]] = {}
        self.strip: Strip | None = None
        self.sayings: deque[Saying] = deque(maxlen=12)
        self.usage = "no tokens spent"
        self.last = False
        self.bars = make_bars(clock)
        self.tasks: dict[str, TaskID] = {}
        self.version = 0
        self.drawn: tuple[object, list[list[Segment]], list[list[Segment]]] = (None, [], [])
        self.lock = threading.RLock()  # events come from the run's thread, drawing from rich's

    def take(self, event: Event) -> None:
        """Take in one event; raises on one of an unexpected shape."""
        take = getattr(self, f"take_{event['type']}", None)
        with self.lock:
            if take is not None:
                take(event)
                self.version += event["type"] != "progress"

    def say(self, who: str, text: object, style: str = "") -> None:
        """Add a line to the words shown, if there are any."""
        if words := clean(text, 600):
            self.sayings.append(Saying(clean(who, 12), words, style))

    def take_start(self, event: Event) -> None:
        """The names in the heading."""
        self.name, self.target = clean(event["run"], 40), float(event["target"])
        self.model, self.planner = clean(event["model"], 60), clean(event["planner"], 60)

    def take_node(self, event: Event) -> None:
        """Light a node; the bars of the node before are done with."""
        self.node, self.iteration = str(event["node"]), int(event.get("iteration") or 0)
        self.clear_bars()

    def clear_bars(self) -> None:
        """Take away the bars of what is done."""
        for task in self.tasks.values():
            self.bars.remove_task(task)
        self.tasks.clear()

    def take_progress(self, event: Event) -> None:
        """Move a bar, or add one; the oldest gives way when there are many."""
        label, done, total = clean(event["label"], 30), int(event["done"]), int(event["total"])
        task = self.tasks.get(label)
        if task is not None and self.bars.tasks[self.bars.task_ids.index(task)].finished and done < total:
            self.bars.remove_task(self.tasks.pop(label))
            task = None
        if task is None:
            if len(self.tasks) >= MAX_BARS:
                self.bars.remove_task(self.tasks.pop(next(iter(self.tasks))))
            self.tasks[label] = task = self.bars.add_task(label, total=total, completed=min(done, total))
        self.bars.update(task, completed=min(done, total), total=total)

    def take_profile(self, event: Event) -> None:
        """Name the layers that are dearest to prune."""
        self.say("profile", tell_profile(event).removeprefix("profile: "))

    def take_layers(self, event: Event) -> None:
        """Colour the strip."""
        self.strip = make_strip(event) if event["names"] else None

    def take_plan(self, event: Event) -> None:
        """What the planner wants and why."""
        words = [clean(event["plan"]), clean(event.get("reason", ""), 500)]
        self.say(f"plan {event['iteration']}", ": ".join(word for word in words if word))

    def take_reply(self, event: Event) -> None:
        """Only what was wrong with a reply; its tokens are in the last line."""
        self.say("handed back", event["problem"], "yellow")

    def take_tool(self, event: Event) -> None:
        """What a planner looks up or tries out."""
        self.say(f"tool {event['iteration']}", tell_tool(event).partition(": ")[2])

    def take_approval(self, event: Event) -> None:
        """What a person said."""
        if event["decision"] != "refuse":  # its trial says it
            self.say(f"approval {event['iteration']}", tell_approval(event).partition(": ")[2])

    def take_parting(self, event: Event) -> None:
        """Where a replay differs."""
        self.say("record", tell(event), "yellow")

    def take_trial(self, event: Event) -> None:
        """A row of the table; a trial that is shown again, say after a resume, keeps its row."""
        number, verdict = int(event["iteration"]), str(event["verdict"])
        trial_cells(event)  # refuses a trial that could not be drawn, here rather than in rich's thread
        self.trials[number] = dict(event)
        self.trials = dict(sorted(self.trials.items()))
        if number:
            self.say(f"{verdict} {number}", event.get("reason", ""), VERDICTS.get(verdict, ""))

    def take_rollback(self, event: Event) -> None:
        """Which weights came back."""
        self.say(f"restored {event['iteration']}", tell_rollback(event).partition(": ")[2], "red")

    def take_lesson(self, event: Event) -> None:
        """What a trial taught."""
        self.say(f"lesson {event['iteration']}", tell_lesson(event).partition(": ")[2], "magenta")

    def take_lessons(self, event: Event) -> None:
        """What earlier runs taught."""
        self.say("memory", tell(event), "magenta")

    def take_usage(self, event: Event) -> None:
        """Tokens and cost."""
        self.usage = tell_usage(event).removeprefix("agents: ")

    def take_note(self, event: Event) -> None:
        """A remark of the run."""
        self.say("note", event["text"])

    def take_result(self, event: Event) -> None:
        """The clock stops with the result."""
        self.clear_bars()
        self.seconds = float(event["seconds"])

    # Drawing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the picture: what only events change is kept, bars and clock are drawn anew."""
        with self.lock:
            width = options.max_width
            bars = render(console, [self.bars], width) if self.tasks else []
            rows = 500 if self.last else console.size.height - 1
            key = (self.version, width, rows, len(bars))
            if self.drawn[0] != key:
                head = render(console, [self.draw_heading(), *draw_loop(self.node, width)], width)
                body = render(console, self.draw_body(console, width, rows - len(head) - len(bars) - 1), width)
                self.drawn = (key, head, body)
            foot = render(console, [self.draw_foot()], width)
            yield SegmentLines([*self.drawn[1], *bars, *self.drawn[2], *foot], new_lines=True)

    def draw_heading(self) -> Rule:
        """Who prunes what, and how far it has come."""
        words = [self.model, f"target {show_percent(self.target, 1)}", self.planner]
        words += [f"iteration {self.iteration}"] if self.iteration else []
        title = Text(f"Billhook {self.name}", style="bold")
        title.append("".join(f" · {word}" for word in words if word), "not bold")
        return Rule(title, align="left", style="bright_black")

    def draw_body(self, console: Console, width: int, room: int) -> list[ConsoleRenderable]:
        """Trials, strip and words, in the lines that are left."""
        strip = count_strip_lines(self.strip, width) if self.strip else 0
        trials, strip_fits, sayings = share_rows(room, min(len(self.trials), MAX_TRIALS), strip)
        body: list[ConsoleRenderable] = []
        spare = room - (strip if strip_fits else 0) - trials - 1 - sayings
        gap = [Text("")] if spare >= 4 else []
        lines = 1 + min(max(spare - 4 * len(gap), 0) // max(trials, 1), 2)
        if self.trials:
            body += [*gap, draw_trials(list(self.trials.values()), width, trials, lines)]
        if self.strip and strip_fits:
            coloured = console.color_system in ("256", "truecolor") and not console.no_color
            body += [*gap, *draw_strip(self.strip, width, coloured)]
        if self.sayings:
            body += [*gap, *draw_sayings(self.sayings, width, sayings)]
        return [*body, *gap]

    def draw_foot(self) -> Text:
        """Tokens, cost and time."""
        seconds = int(self.seconds if self.seconds >= 0 else self.clock() - self.begun)
        elapsed = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return Text(f"{self.usage} · elapsed {elapsed}", style="bold", no_wrap=True, overflow="ellipsis")


def make_bars(clock: Clock) -> Progress:
    """Bars with the time left, judged over the whole step: its ticks may be a minute apart."""
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=24)),
        BarColumn(bar_width=None, complete_style="cyan"),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        get_time=clock,
        speed_estimate_period=86400,
        auto_refresh=False,
        expand=True,
    )


def render(console: Console, parts: Iterable[ConsoleRenderable | Progress], width: int) -> list[list[Segment]]:
    """Draw parts beneath each other, as lines of segments."""
    options = console.options.update(width=width, height=None)
    return [line for part in parts for line in console.render_lines(part, options, pad=False)]


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


# What others print while the picture stands ---------------------------------------------------------


class LinesAbove(io.TextIOBase):
    """A stream that prints whole lines above the picture.

    rich's own proxy reads markup in what is flushed and prints every step of a tqdm bar as a line.
    """

    def __init__(self, console: Console, stream: TextIO) -> None:
        self.console = console
        self.rich_proxied_file = stream  # rich's name for it: consoles write to the stream itself
        self.rest = ""

    def write(self, text: str) -> int:
        """Print the lines that are whole; of a line that was written over only its last state."""
        *lines, self.rest = (self.rest + text).split("\n")
        self.rest = self.rest[self.rest.rfind("\r", 0, -1) + 1 :][-10_000:]
        for line in lines:
            self.console.print(Text(strip_controls(line.rstrip("\r").rpartition("\r")[2])))
        return len(text)

    def finish(self) -> None:
        """Print what was left without an end of line."""
        if self.rest:
            self.write("\n")

    def isatty(self) -> bool:
        """Say what the stream itself would say."""
        return self.rich_proxied_file.isatty()

    def fileno(self) -> int:
        """The stream's own, for processes that are started meanwhile."""
        return self.rich_proxied_file.fileno()


@contextmanager
def print_above(console: Console) -> Iterator[None]:
    """Have all that is written to the terminal meanwhile appear above the picture, log handlers included."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    above = {name: LinesAbove(console, stream) for name, stream in streams.items() if stream and stream.isatty()}
    handlers = []
    for handler in find_handlers():
        for name, proxy in above.items():
            if handler.stream is streams[name]:
                handlers.append((handler, streams[name]))
                handler.setStream(proxy)
    for name, proxy in above.items():
        setattr(sys, name, proxy)
    try:
        yield
    finally:
        for name, proxy in above.items():
            if getattr(sys, name) is proxy:
                setattr(sys, name, streams[name])
            proxy.finish()
        for handler, stream in handlers:
            handler.setStream(stream)


def find_handlers() -> list[logging.StreamHandler[Any]]:
    """All log handlers that write to a stream: they hold on to the stream they were made with."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {id(h): h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    # logging's own last resort looks sys.stderr up each time, and its stream cannot be set.
    return [h for h in handlers.values() if isinstance(h, logging.StreamHandler) and "stream" in vars(h)]
