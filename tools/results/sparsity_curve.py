"""Perplexity over the sparsity of recipes that were compared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tools.base.rows import save_figure
from tools.plans.jobs import ALL_ALLOCATIONS, ALL_METHODS

if TYPE_CHECKING:
    from pathlib import Path

    from tools.results.comparison import Row
import re
from typing import TYPE_CHECKING, NamedTuple

from tools.plans.jobs import name_target

if TYPE_CHECKING:
    from pathlib import Path

    from tools.results.comparison import Row


class Point(NamedTuple):
    """One row."""

    tokens: int
    """0 without a polish."""
    kl: float
    error: float


def list_curves(rows: "Sequence[Row]") -> dict[str, list[Point]]:
    """The points of each recipe at each sparsity, by tokens; those with one alone are left out.

    A row without a polish is a point of the recipe that it is the beginning of.
    """
    curves: dict[str, list[Point]] = {}
    for row in rows:
        if row.kl is not None:
            name = f"{re.sub(r'[+]polish[0-9]*', '', row.recipe)} at {name_target(row.sparsity, row.pattern)}"
            tokens = row.polished.tokens if row.polished else 0
            curves.setdefault(name, []).append(Point(tokens, row.kl, row.kl_error or 0.0))
    return {
        name: sorted(points) for name, points in curves.items() if len(points) > 1 and any(p.tokens for p in points)
    }


def plot_curves(curves: dict[str, list[Point]], kind: str, path: "Path") -> None:
    """Draw them, with the standard errors of the KL."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        tokens, kl, errors = zip(*points, strict=True)
        axes.errorbar(tokens, kl, yerr=errors, marker="o", capsize=3, label=name)
    # Linear up to the least polish, so that none at all has a place.
    axes.set_xscale(
        "symlog", linthresh=min(point.tokens for points in curves.values() for point in points if point.tokens)
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the polish")
    axes.set_ylabel("KL(dense || pruned) on the validation text, nats per token")
    axes.legend(fontsize="small")
    save_figure(figure, kind, path)


LABELLED = 10
"""Recipes that the plot's legend names, the best ones; it explains the colours and marks of the others."""

_MARKS = "osD^v*PX<>ph"


def plot_sparsity(
    rows: "Sequence[Row]", recipes: Sequence[str], dense_perplexity: float, kind: str, path: "Path"
) -> None:
    """Draw a line for each recipe, which come best first: coloured by allocation, marked by method, hollow for N:M."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatter

    allocations = list(dict.fromkeys([*ALL_ALLOCATIONS, *(row.allocation for row in rows)]))
    methods = list(dict.fromkeys([*ALL_METHODS, *(row.method for row in rows)]))
    colors = {name: f"C{i % 10}" for i, name in enumerate(allocations)}
    marks = {name: _MARKS[i % len(_MARKS)] for i, name in enumerate(methods)}

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    legend = [axes.axhline(dense_perplexity, color="0.5", linestyle=":", label="dense")]
    for i, recipe in enumerate(recipes):
        own = [row for row in rows if row.recipe == recipe]
        named = i < LABELLED
        look: dict[str, Any] = {"color": colors[own[0].allocation], "marker": marks[own[0].method]}
        paled = look | {"alpha": 1.0 if named else 0.4, "zorder": 3 if named else 2}
        axes.plot(*_list_points(own, patterned=False), **paled)
        axes.plot(*_list_points(own, patterned=True), **paled, linestyle="", fillstyle="none")
        if named:
            legend.append(Line2D([], [], **look, label=recipe))
    if len(recipes) > LABELLED:
        used = {name for row in rows for name in (row.allocation, row.method)}
        legend += [Line2D([], [], color=colors[name], label=name) for name in allocations if name in used]
        legend += [
            Line2D([], [], color="0.4", linestyle="", marker=marks[name], label=name)
            for name in methods
            if name in used
        ]
    if any(row.pattern for row in rows):
        legend.append(Line2D([], [], color="0.4", linestyle="", marker="o", fillstyle="none", label="hollow: N:M"))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("sparsity")
    axes.set_ylabel("perplexity on the validation text")
    figure.legend(handles=legend, loc="outside right upper", fontsize="small")
    save_figure(figure, kind, path)


def _list_points(rows: "Sequence[Row]", *, patterned: bool) -> tuple[list[float], list[float]]:
    """(sparsities, perplexities)."""
    points = sorted(
        (row.achieved_sparsity, row.perplexity)
        for row in rows
        if row.perplexity is not None and bool(row.pattern) is patterned
    )
    return [x for x, _ in points], [y for _, y in points]
