"""matplotlib's SVG, inline in a page whose style sheet gives it ink and fonts: the one place for the figures' style.

What is drawn in a colour of `INKS` follows the page's theme; the colours of a map are fixed, and even in lightness, so
that they can be told apart by anyone and in grey. Marks differ by shape as well.
"""

import io
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from tools.base.rows import save_figure

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INKS = {
    "ink": "#010a01",
    "muted": "#020a02",
    "rule": "#030a03",
    "accept": "#040a04",
    "rollback": "#050a05",
    "refuse": "#060a06",
}
"""Colours of the page by name: drawn as these, which nothing else is drawn in, and then replaced by var(--NAME)."""

WIDTH = 400
"""Pixels of a figure: on a phone it is scaled down a little, on a desk up a little."""

CELLS = "cells"
"""Id of a map's cells, row by row."""

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE: Any = {  # the keys' type is a list of all that matplotlib knows
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.edgecolor": INKS["muted"],
    "axes.labelcolor": INKS["muted"],
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": INKS["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"],
    "text.color": INKS["ink"],
    "text.parse_math": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "path.simplify": False,
}
_DRAWING = threading.Lock()  # matplotlib's settings are the whole process's, and a server has several threads


@contextmanager
def draw(width: int, height: int) -> Iterator["Figure"]:
    """An empty figure of this many pixels, in the report's style."""
    import matplotlib
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells that it lists the fonts, once
    with _DRAWING, matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        figure.patch.set_visible(False)
        yield figure


def as_svg(figure: "Figure", name: str, label: str, titles: Sequence[str] = ()) -> Markup:
    """The figure as an <svg> element. Its ids begin with `name`, which no other figure of the page may have.

    `label` says to those who cannot see it what it shows; `titles` are shown when a pointer rests on a cell of a map.
    """
    file = io.BytesIO()
    save_figure(figure, "svg", file)
    root = ElementTree.fromstring(file.getvalue())
    for child in [c for c in root if c.tag == f"{{{_SVG}}}metadata"]:
        root.remove(child)
    for defs in root.findall(f"{{{_SVG}}}defs"):
        for style in defs.findall(f"{{{_SVG}}}style"):
            defs.remove(style)  # it is meant for a file of its own, and would style the whole page
    for group in root.iter(f"{{{_SVG}}}g"):
        if group.get("id") == CELLS:
            for path, title in zip(group, titles, strict=True):
                ElementTree.SubElement(path, f"{{{_SVG}}}title").text = title
    _tidy(root, name)
    root.attrib = {"class": "figure", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    ElementTree.register_namespace("", _SVG)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _tidy(root: ElementTree.Element, name: str) -> None:
    """Make ids unique in the page, colours those of the page, and leave out what is not needed."""
    inks = {color: f"var(--{ink})" for ink, color in INKS.items()}
    for element in root.iter():
        if style := element.get("style"):
            style = re.sub(r"font-family:[^;]*;?|font: ", lambda m: "" if m[0] != "font: " else m[0], style)
            element.set("style", re.sub("#0[1-6]0a0[1-6]", lambda m: inks[m[0]], style).strip())
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
        if clip := element.get("clip-path"):
            element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))
        if link := element.attrib.pop(f"{{{_XLINK}}}href", ""):
            element.set("href", f"#{name}-{link.removeprefix('#')}")
        if element.tag == f"{{{_SVG}}}path":
            element.set("d", " ".join(element.get("d", "").split()))
        if element.text and not element.text.strip():
            element.text = None
        if element.tail and not element.tail.strip():
            element.tail = None
    used = {e.get("href", "").removeprefix("#") for e in root.iter()}
    used |= {e.get("clip-path", "").removeprefix("url(#").removesuffix(")") for e in root.iter()}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def set_log_ticks(axis: "Axis", low: float, high: float) -> None:
    """A few labelled ticks for values from `low` to `high` on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    span = high / low
    subs = (1, 1.5, 2, 3, 5, 7) if span < 4 else (1, 2, 5) if span < 30 else (1, 3) if span < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axis.set_major_formatter(lambda value, _position: f"{value:g}")
    axis.set_minor_locator(NullLocator())
