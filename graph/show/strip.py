"""The strip of a run's layers: sparsity by kind and block, in colours or in tenths."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from rich.style import Style
from rich.text import Text

from graph.show.trials import WIDE
from graph.show.words import Event
from tools.base.words import clean, count, show_percent

MAX_KINDS = 16

# Viridis: even steps in lightness, so it reads in order for the colour-blind and in grey as well.
SHADES = (
    *((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140)),
    *((34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37)),
)


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
