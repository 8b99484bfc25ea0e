"""The figures of the report: perplexity and sparsity over the iterations, predictions, maps of the layers."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tools.base.words import strip_controls
from tools.results.page.svg import CELLS, INKS, WIDTH, as_svg, draw, set_log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = {"accept": "o", "rollback": "X", "refuse": "D"}
"""Shape of a trial's mark; its colour is the ink of the same name."""

MOST_KINDS = 24
"""Columns of a map; where a model has more kinds of layers, those that differ only in a number are taken together."""

LABELLED = 16
"""Trials that are labelled with their iteration; the labels of more would cover one another."""


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

    rows, labels, values, titles = _arrange(cells, log=log, percent=percent)
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
        axes.set_xticks(np.arange(len(labels)) + 0.5, labels, rotation=45, ha="left", rotation_mode="anchor")
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
        return as_svg(figure, name, label, titles)


def _arrange(
    cells: Sequence[Cell], *, log: bool, percent: bool
) -> tuple[list[int], list[str], NDArray[np.float64], list[str]]:
    """(the blocks of the rows, the labels of the columns, the cells' values, nan where empty, their titles by row)."""
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
    return rows, labels, values, [title for row in titles for title in row]


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
