"""The loop of the graph, with the present node lit; and text that fits a width."""

import io

from rich.console import Console
from rich.text import Text

LOOP = (
    "profile → (brief) → plan → (approve) → prune → validate ─┬─ accept ───┐",
    "   ↑                  ↑                                  └─ rollback ─┤",
    "   └──────────────────┴────────────────── reflect ←───────────────────┘ → finish",
)
NODES = ("profile", "brief", "plan", "approve", "prune", "validate", "accept", "rollback", "reflect", "finish")
LIT = {"accept": "bold reverse green", "rollback": "bold reverse red"}


def draw_loop(node: str, width: int) -> list[Text]:
    """The loop with the present node lit; a row of the nodes where the picture is too wide."""
    lines = LOOP if width >= len(LOOP[2]) else (" ".join(NODES[:5]), " ".join(NODES[5:]))
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
