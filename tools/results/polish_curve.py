"""KL over the tokens of a polish: a line for each recipe that was polished on several numbers of them."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tools.base.rows import save_figure
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
