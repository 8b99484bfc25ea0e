"""Perplexity over the sparsity of recipes that were compared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tools.base.rows import save_figure
from tools.plans.jobs import ALL_ALLOCATIONS, ALL_METHODS

if TYPE_CHECKING:
    from pathlib import Path

    from tools.results.comparison import Row

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
