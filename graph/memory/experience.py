"""What levers did to KL in earlier runs on a model and its relatives, as a short table of means."""

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, stdev

from langgraph.store.base import BaseStore

from graph.config import RunConfig
from graph.memory.lessons import EXPERIENCE, find_models, is_relative, keep_latest
from graph.reflecting.schema import Experience, Tried

KEPT = 300
"""Trials that are kept of one model, the latest."""

ROWS = 6
"""Rows that a run starts with: its own model's first, then those of most trials."""


def write_tried(store: BaseStore, config: RunConfig, tried: Tried) -> None:
    """Keep what a trial's levers did; writing it again (after a crash) changes nothing."""
    keep_latest(store, EXPERIENCE, config.model, f"{tried.run}/{tried.iteration}", tried.model_dump(), KEPT)


def read_experience(store: BaseStore, config: RunConfig, run: str) -> list[Experience]:
    """What earlier runs with the same pattern found, by model, sparsity and levers; relatives' rows name their model.

    Nothing is computed with it, so that runs of the same trials are in it, too.
    """
    rows = []
    for model, items in find_models(store, EXPERIENCE).items():
        if is_relative(model, config.model):
            tried = [Tried.model_validate(item.value) for item in items if item.value["run"] != run]
            name = "" if model == config.model else model
            rows += average((x for x in tried if x.pattern == config.pattern), name)
    chosen = sorted(rows, key=lambda row: (bool(row.model), -row.trials))[:ROWS]
    return sorted(chosen, key=order_row)


def order_row(row: Experience) -> tuple[object, ...]:
    """By what rows are sorted: relatives last, then by sparsity."""
    return bool(row.model), row.model, row.sparsity, row.levers


def average(tried: Iterable[Tried], model: str = "") -> list[Experience]:
    """One row for all trials with the same levers at the same sparsity, to a percent.

    A run that was made again says nothing new: its trials come to the same, to the last digit, and count once.
    """
    groups: dict[tuple[str, float], list[Tried]] = defaultdict(list)
    for one in {(x.levers, x.sparsity, x.iteration, x.change, x.error): x for x in tried}.values():
        groups[one.levers, round(one.sparsity, 2)].append(one)
    return [
        Experience(
            levers=levers,
            sparsity=sparsity,
            change=fmean(one.change for one in group),
            error=_find_error(group),
            trials=len(group),
            runs=len({one.run for one in group}),
            model=model,
        )
        for (levers, sparsity), group in groups.items()
    ]


def _find_error(group: list[Tried]) -> float:
    """Standard error of a mean: by the errors of its trials, or by how far these lie apart where that is more."""
    own = math.sqrt(sum(one.error**2 for one in group))
    apart = stdev(one.change for one in group) * math.sqrt(len(group)) if len(group) > 1 else 0.0
    return max(own, apart) / len(group)
