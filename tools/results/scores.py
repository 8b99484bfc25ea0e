"""Figures of models on tasks, side by side: what they must share, and how far they are apart. No torch in here."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from tools.base.errors import UserError
from tools.results.schema import Score


class Result(BaseModel):
    """A figure and what it is the mean of."""

    score: Score
    values: list[float] = Field(
        description="One for each question, in order; empty where the figure is not their plain mean."
    )


def name_score(score: Score) -> str:
    """Its task and metric."""
    return f"{score.task} {score.metric}"


def find_differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The fields in which two protocols differ, with both values where these are short."""
    differing = []
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name), second.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            differing += [f"{name}.{line}" for line in find_differences(one, other)]
        else:
            pair = f"{one} and {other}"
            differing.append(f"{name} ({pair})" if len(pair) < 60 else name)
    return differing


def compare_scores(scores: Iterable[Score]) -> None:
    """Refuse to set figures of one task and metric side by side that were not measured alike. Raises UserError."""
    firsts: dict[tuple[str, str], Score] = {}
    for score in scores:
        first = firsts.setdefault((score.task, score.metric), score)
        if differing := find_differences(first.protocol, score.protocol):
            raise UserError(
                f"{name_score(score)} of {first.model} and of {score.model} must not be compared; their "
                f"protocols differ in {', '.join(differing)}"
            )


class Difference(NamedTuple):
    """A figure less the first model's."""

    value: float
    error: float | None
    paired: bool
    """Whether the error is that of the differences question by question."""


def subtract(result: Result, first: Result) -> Difference | None:
    """The difference to the first model's figure; None where one was not finite. Raises UserError by protocol."""
    compare_scores([first.score, result.score])
    if result.score.value is None or first.score.value is None:
        return None
    value = result.score.value - first.score.value
    if result.values and len(result.values) == len(first.values):
        differences = np.subtract(result.values, first.values)
        count = len(differences)
        return Difference(value, float(np.std(differences, ddof=1) / math.sqrt(count)) if count > 1 else None, True)
    errors = (result.score.error, first.score.error)
    return Difference(value, None if None in errors else math.hypot(*(e for e in errors if e is not None)), False)
