"""Figures, durations, sizes and counts for people; and text of models and files without what a terminal would obey.

The one place for each of these: whoever tells a figure, in a table, a report or a line, calls it here.
"""

import math
import re
import unicodedata
from typing import Literal

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # window titles, links
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # colours, cursor
    r"|\x1b[ -/]*[0-~]?"
)
_BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def strip_controls(text: str, *, lines: bool = False) -> str:
    """Take out escape sequences and every character that is not printed as itself; a tab becomes a space.

    Line ends go as well, but with `lines` they stay, as newlines.
    """
    text = _ESCAPES.sub("", text).replace("\t", " ")
    if lines:
        return "\n".join(strip_controls(line) for line in re.split(r"\r\n|\r|\n", text))
    return "".join(c for c in text if unicodedata.category(c)[0] != "C")


def clean(text: object, limit: int = 300) -> str:
    """Make one harmless line of at most `limit` characters from text that a model or a file supplied."""
    head = str(text)[: 8 * limit]  # a reply of megabytes is not worth looking through
    return shorten(strip_controls(" ".join(head.split())), limit)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters of a text; a mark stands for the rest."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str, limit: int) -> str:
    """Text as one line of at most `limit` characters."""
    return shorten(" ".join(text[: 4 * limit].split()), limit)


def escape(text: str) -> str:
    """Text from models and files inside a Markdown table cell: one line, no markup of its own."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for mark in "\\`*_[]<>|":
        flat = flat.replace(mark, "\\" + mark)
    return flat


def spare_brackets(text: str) -> str:
    """JSON whose strings have no angle brackets, which say the same: nothing in it can end a block of data, and no
    quoting makes anything else of it."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def count(number: int, noun: str) -> str:
    """1 lesson, 2,000 lessons"""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def show(value: float | None, digits: int = 2) -> str:
    """A measured figure: a perplexity to two digits behind the point, a KL to four."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def show_short(value: float | None) -> str:
    """A measured figure to three significant digits, as planners and reflectors read it."""
    return "not finite" if value is None else f"{value:.3g}"


def round_seconds(seconds: float) -> float:
    """One digit of tens of seconds, two of hundreds and more, as agents read them, and none of a second's parts: of a
    machine that is a little slower they are told, and plan, the same, and two rounds of which one takes half as long
    again are told apart."""
    return float(round(seconds) if seconds < 10 else f"{seconds:.1e}" if seconds >= 100 else f"{seconds:.0e}")


def show_compact(value: float | None, digits: int = 2) -> str:
    """A measured figure; huge ones in powers of ten, so that a column keeps its width."""
    return show(value, digits) if value is None or abs(value) < 1e5 else f"{value:.1e}"


def show_score(value: float | None, error: float | None) -> str:
    """A figure and its standard error, where it has one: 0.6200 ± 0.0200."""
    figure = show(value, 4)
    return figure if value is None or error is None else f"{figure} ± {error:.4f}"


def show_rounded(value: float, error: float | None) -> str:
    """0.62 ± 0.020 as 0.620 ± 0.020: two digits of the error, and of the figure as many behind the point."""
    if not error:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def show_percent(value: float | None, digits: int = 2) -> str:
    """0.45 as 45.00%."""
    return "not finite" if value is None else f"{value:.{digits}%}"


def show_share(value: float | None, error: float | None) -> str:
    """A share and its standard error, where it has one: 70.4% ± 3.8%."""
    share = show_percent(value, 1)
    return share if value is None or error is None else f"{share} ± {error:.1%}"


def show_size(size: float, unit: Literal["GB", "MB"] | None = None, digits: int = 1) -> str:
    """Bytes: 2100000000 as 2.1 GB, in the unit asked for, or in the largest of which there is one."""
    told: str | None = unit or next((name for name, least in _BYTES.items() if size >= least), None)
    return f"{size / _BYTES[told]:.{digits}f} {told}" if told else f"{size:.0f} bytes"


def show_seconds(value: float) -> str:
    """301.2 as 5 min 1 s."""
    seconds = round(value)
    if seconds < 60:
        return f"{value:.1f} s"
    return (
        f"{seconds // 60} min {seconds % 60} s" if seconds < 3600 else f"{seconds // 3600} h {seconds % 3600 // 60} min"
    )
