"""The figures of the report: matplotlib's SVG, inline in a page whose style sheet gives it ink and fonts.

The one place for their style. What is drawn in a colour of `INKS` follows the page's theme; the colours of a map are
fixed, and even in lightness, so that they can be told apart by anyone and in grey. Marks differ by shape as well.
"""

import io
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from tools.base.rows import save_figure
from tools.base.words import strip_controls

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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

MARKS = {"accept": "o", "rollback": "X", "refuse": "D"}
"""Shape of a trial's mark; its colour is the ink of the same name."""

MOST_KINDS = 24
"""Columns of a map; where a model has more kinds of layers, those that differ only in a number are taken together."""

LABELLED = 16
"""Trials that are labelled with their iteration; the labels of more would cover one another."""

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


class Mark(NamedTuple):
    """A trial in a figure."""

    iteration: int
    verdict: str
    value: float | None
    """None where it was not finite."""


class Cell(NamedTuple):
    """A layer in a map."""

    name: str
    block: int
    kind: str
    value: float


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


# --- over the iterations -------------------------------------------------------------------------------------------


def draw_iterations(
    name: str, label: str, marks: Sequence[Mark], start: float | None, target: float | None = None, *, percent: bool
) -> Markup:
    """A figure of every trial over its iteration, those that were kept joined by a line.

    `start` is the dense model's, and where the line begins; `target` a level to be reached. What is not finite
    stands at the upper edge.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with draw(WIDTH, 250) as figure:
        axes = figure.add_axes((0.135, 0.17, 0.85, 0.79))
        finite = [m.value for m in marks if m.value is not None] + ([] if start is None else [start])
        axes.grid(axis="y")
        if start is not None:
            axes.axhline(start, color=INKS["muted"], linestyle=(0, (1, 2)), linewidth=1.2)
        if target is not None:
            axes.axhline(target, color=INKS["ink"], linestyle=(0, (5, 3)), linewidth=1.2)
        kept = [(m.iteration, m.value) for m in marks if m.verdict == "accept" and m.value is not None]
        line = ([(0, start)] if start is not None else []) + kept
        axes.plot(*zip(*line, strict=True) if line else ([], []), color=INKS["accept"], zorder=2)
        for verdict, shape in MARKS.items():
            own = [m for m in marks if m.verdict == verdict]
            seen = [(m.iteration, m.value) for m in own if m.value is not None]
            _mark(axes, seen, verdict, shape)
            for m in own:
                if m.value is None:
                    axes.plot([m.iteration], [1], color=INKS[verdict], marker="^", linestyle="", markersize=8,
                              clip_on=False, transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_xlabel("iteration (0: the dense model)")
        last = max([m.iteration for m in marks], default=0)
        axes.set_xlim(-0.3, max(last, 1) + 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        if percent:
            top = max([*finite, target or 0, 0.05])
            axes.set_ylim(0, min(top * 1.12, 1.02))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        elif finite and min(finite) > 0 and max(finite) > 8 * min(finite):
            axes.set_yscale("log")
            set_log_ticks(axes.yaxis, min(finite), max(finite))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.margins(y=0.15)
        return as_svg(figure, name, label)


def _mark(axes: "Axes", points: Sequence[tuple[float, float]], verdict: str, shape: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), color=INKS[verdict], marker=shape, linestyle="", markersize=8, zorder=3,
                  markeredgewidth=0, clip_on=False)  # fmt: skip


# --- predicted and measured ----------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """A trial's KL, predicted and measured, nats per token; both above 0."""

    iteration: int
    verdict: str
    predicted: float
    measured: float
    error: float
    """Standard error of what was measured; 0 where it is not known."""


def draw_predictions(name: str, label: str, points: Sequence[Prediction]) -> Markup:
    """Measured over predicted KL on logarithmic axes of one scale, with the diagonal on which a prediction is right."""
    with draw(WIDTH, 330) as figure:
        axes = figure.add_axes((0.165, 0.14, 0.8, 0.83))
        values = [v for p in points for v in (p.predicted, p.measured)]
        low, high = min(values) / 1.6, max(values) * 1.6
        axes.grid()
        axes.plot([low, high], [low, high], color=INKS["muted"], linestyle=(0, (5, 3)), linewidth=1.2)
        for p in points:
            if p.error:
                reach = [max(p.measured - p.error, low / 10), p.measured + p.error]
                axes.plot([p.predicted] * 2, reach, color=INKS[p.verdict], linewidth=1.4)
        for near in group_near(points) if len(points) <= LABELLED else []:
            x, y = max(p.predicted for p in near), near[0].measured
            words = ", ".join(str(p.iteration) for p in near)
            axes.annotate(words, (x, y), xytext=(8, -4), textcoords="offset points")
        for verdict, shape in MARKS.items():
            _mark(axes, [(p.predicted, p.measured) for p in points if p.verdict == verdict], verdict, shape)
        for axis, set_scale, set_limits in (
            (axes.xaxis, axes.set_xscale, axes.set_xlim),
            (axes.yaxis, axes.set_yscale, axes.set_ylim),
        ):
            set_scale("log")
            set_limits(low, high)
            set_log_ticks(axis, low, high)
        axes.set_xlabel("predicted KL, nats per token")
        axes.set_ylabel("measured KL")
        return as_svg(figure, name, label)


def group_near(points: Sequence[Prediction]) -> list[list[Prediction]]:
    """Points so near to one another that their labels would overlap."""
    groups: list[list[Prediction]] = []
    for p in points:
        near = (g for g in groups if _is_near(g[0].predicted, p.predicted) and _is_near(g[0].measured, p.measured))
        group = next(near, None)
        if group is None:
            groups.append([p])
        else:
            group.append(p)
    return groups


def _is_near(first: float, second: float) -> bool:
    return max(first, second) < 1.1 * min(first, second)


# --- maps ----------------------------------------------------------------------------------------------------------


def draw_map(
    name: str, label: str, cells: Sequence[Cell], limits: tuple[float, float], *, log: bool, percent: bool
) -> Markup:
    """A map of the model: a row for each block, a column for each kind of layer, coloured between `limits`.

    Where several layers share a cell their mean stands there. Cells without a layer, and on a logarithmic scale those
    without a value above 0, stay empty.
    """
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

    kinds, labels = name_columns(list(dict.fromkeys(cell.kind for cell in cells)))
    columns = list(dict.fromkeys(kinds.values()))
    rows = sorted({cell.block for cell in cells})
    at = {block: i for i, block in enumerate(rows)}
    shared: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        shared.setdefault((at[cell.block], columns.index(kinds[cell.kind])), []).append(cell)
    values = np.full((len(rows), len(columns)), np.nan)
    titles = [[""] * len(columns) for _ in rows]
    for (row, column), members in shared.items():
        mean = float(np.mean([cell.value for cell in members]))
        values[row, column] = mean if mean > 0 or not log else np.nan
        what = members[0].name if len(members) == 1 else f"block {rows[row]}, {columns[column]}: mean of {len(members)}"
        titles[row][column] = f"{strip_controls(what)}: {f'{mean:.2%}' if percent else f'{mean:.3g}'}"

    tall = min(max(15 if len(rows) <= 40 else 600 / len(rows), 2.5), 30)  # pixels of a row
    above, below = 14 + 4.7 * max(map(len, labels)), 46
    height = round(above + tall * len(rows) + below)
    with draw(WIDTH, height) as figure:
        axes = figure.add_axes((0.09, below / height, 0.86, tall * len(rows) / height))
        norm: Normalize = LogNorm(*limits) if log else Normalize(*limits)
        look: dict[str, Any] = {
            **{"cmap": matplotlib.colormaps["cividis" if log else "viridis"].resampled(32), "norm": norm},
            **{"edgecolors": "face", "linewidth": 0.3},
        }
        axes.pcolormesh(np.ma.masked_invalid(values), gid=CELLS, **look)
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        axes.set_xticks(np.arange(len(columns)) + 0.5, labels, rotation=45, ha="left", rotation_mode="anchor")
        found = MaxNLocator(9, integer=True, min_n_ticks=1).tick_values(0, max(len(rows) - 1, 1))
        ticks = [int(i) for i in found if 0 <= i < len(rows)]
        axes.set_yticks([i + 0.5 for i in ticks], [str(rows[i]) for i in ticks])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

        bar = figure.add_axes((0.09, 26 / height, 0.86, 8 / height))
        edges = norm.inverse(np.linspace(0, 1, 33))
        bar.pcolormesh(edges, [0, 1], norm.inverse((np.arange(32) + 0.5) / 32)[None], **look)
        bar.yaxis.set_major_locator(NullLocator())
        bar.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if log:
            bar.set_xscale("log")
            set_log_ticks(bar.xaxis, *limits)
        bar.tick_params(length=3, pad=2)
        bar.spines[:].set_visible(False)
        return as_svg(figure, name, label, [title for row in titles for title in row])


def name_columns(kinds: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(the column of each kind, the columns' labels): their last parts where these are enough to tell them apart."""
    names = {kind: kind for kind in kinds}
    if len(kinds) > MOST_KINDS:
        names = {kind: re.sub(r"\b\d+\b", "*", kind) for kind in kinds}
    columns = list(dict.fromkeys(names.values()))
    short = [column.rpartition(".")[2] for column in columns]
    labels = short if len(set(short)) == len(short) else columns
    labels = [strip_controls(label) or "?" for label in labels]
    return names, [label if len(label) <= 28 else f"…{label[-27:]}" for label in labels]
