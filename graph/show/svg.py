"""A recorded run as a picture: the last that its live display showed."""

import io
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from graph.show.display import LiveDisplay
from graph.show.words import SHOWN, Event


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
