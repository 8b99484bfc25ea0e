"""The live picture of a run, taken from its events and drawn to the size of the screen."""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.segment import Segment, SegmentLines
from rich.table import Column
from rich.text import Text

from graph.show.loop import draw_loop, fit
from graph.show.plain import Clock
from graph.show.strip import Strip, count_strip_lines, draw_strip, make_strip
from graph.show.trials import VERDICTS, draw_trials, trial_cells
from graph.show.words import (
    Event,
    tell,
    tell_approval,
    tell_lesson,
    tell_profile,
    tell_request,
    tell_rollback,
    tell_tool,
    tell_usage,
)
from tools.base.progress import name_step
from tools.base.words import clean, show_percent
from tools.results.sentences import name_verdict

MAX_TRIALS = 12
MAX_BARS = 3
STEP_CHARACTERS = 60
"""Of what a bar says, figures included; a narrow screen shows less."""


class Picture:
    """Everything that the live picture shows, taken from events and drawn to the size of the screen."""

    def __init__(self, name: str, target: float, clock: Clock) -> None:
        self.name, self.target, self.model, self.planner = clean(name, 40), f"target {show_percent(target, 1)}", "", ""
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
        self.name = clean(event["run"], 40)
        self.target = f"target {clean(event.get('aim', ''), 40) or show_percent(float(event['target']), 1)}"
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
        label, done, total = str(event["label"]), int(event["done"]), int(event["total"])
        step = name_step(label)
        label = clean(clean(step, 24) + label.removeprefix(step), STEP_CHARACTERS)
        task = self.tasks.get(step)
        if task is not None and self.bars.tasks[self.bars.task_ids.index(task)].finished and done < total:
            self.bars.remove_task(self.tasks.pop(step))
            task = None
        if task is None:
            if len(self.tasks) >= MAX_BARS:
                self.bars.remove_task(self.tasks.pop(next(iter(self.tasks))))
            self.tasks[step] = task = self.bars.add_task(label, total=total, completed=min(done, total))
        self.bars.update(task, description=label, completed=min(done, total), total=total)

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

    def take_request(self, event: Event) -> None:
        """What brought no answer."""
        self.say("request", tell_request(event).partition(": ")[2], "yellow")

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
            self.say(f"{name_verdict(event)} {number}", event.get("reason", ""), VERDICTS.get(verdict, ""))

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
        words = [self.model, self.target, self.planner]
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
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=STEP_CHARACTERS)),
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
