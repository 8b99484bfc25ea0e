"""Losses of a model on a text, window by window, and how those of two models differ. No torch in here."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from tools.base.errors import UserError
from tools.base.student import find_p
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


MOST_NATS = 700.0
"""Below this the exponential is a number."""


class Evaluation(BaseModel):
    """Losses per window; every window has as many tokens of text, so plain means are means over tokens.

    Where texts have names, all figures are means of those of each text by its weight.
    """

    nll: list[float | None] = Field(description="Nats per token of each window; null where it was not finite.")
    kl: list[float | None] = Field(description="KL(dense || model) of each window, nats per token.")
    texts: list[str] = Field(
        [], exclude_if=operator.not_, description="The text of each window, where texts are named."
    )
    weights: dict[str, float] = Field(
        {}, exclude_if=operator.not_, description="What each of them counts beside the others."
    )

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if len(self.nll) != len(self.kl):
            raise ValueError(f"{len(self.nll)} windows with a loss, but {len(self.kl)} with a KL")
        if self.texts and len(self.texts) != len(self.kl):
            raise ValueError(f"{len(self.texts)} windows with a text, but {len(self.kl)} with a KL")
        return self

    @property
    def finite(self) -> bool:
        """Whether every loss is a number."""
        return None not in self.nll and None not in self.kl

    @property
    def perplexity(self) -> float | None:
        """exp of the mean nats per token; None when a window was not finite or the exponential overflows."""
        mean = self._mean(self.nll)
        return math.exp(mean) if mean is not None and mean < MOST_NATS else None

    @property
    def mean_kl(self) -> float | None:
        """Mean KL in nats per token."""
        return self._mean(self.kl)

    @property
    def kl_error(self) -> float | None:
        """Standard error of the mean KL over windows."""
        return self.find_error([k for k in self.kl if k is not None]) if self.finite else None

    def weigh(self, weights: Mapping[str, float]) -> Self:
        """The same losses with what each text counts; those that are not named count nothing."""
        return self.model_copy(update={"weights": {name: weights.get(name, 0.0) for name in self.weights}})

    def take(self, windows: Sequence[int]) -> Self:
        """The losses of some of the windows, by their places."""
        parts = {name: [values[i] for i in windows] for name, values in self._columns().items()}
        return self.model_copy(update=parts)

    def take_text(self, text: str) -> Self:
        """The losses on one of the texts, for themselves."""
        chosen = self.take([i for i, name in enumerate(self.texts) if name == text])
        return chosen.model_copy(update={"texts": [], "weights": {}})

    def _columns(self) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"nll": self.nll, "kl": self.kl}
        return columns | ({"texts": self.texts} if self.texts else {})

    def group(self, values: Sequence[float]) -> list[tuple[float, list[float]]]:
        """(share, values) of the windows of every text that counts, in sum 1; all of them as one where none has a name.

        Where none counts that has windows here, all that have count alike.
        """
        if not self.texts:
            return [(1.0, list(values))]
        grouped: dict[str, list[float]] = {}
        for name, value in zip(self.texts, values, strict=True):
            grouped.setdefault(name, []).append(value)
        weights = {name: self.weights.get(name, 0.0) for name in grouped}
        total = sum(weights.values())
        return [(weights[name] / total, own) for name, own in grouped.items() if weights[name]] if total else []

    def find_mean(self, values: Sequence[float]) -> float:
        """The mean of a figure of each window, every text by its weight; nan where no text here counts."""
        groups = self.group(values)
        return sum(share * float(np.mean(own)) for share, own in groups) if groups else math.nan

    def find_error(self, values: Sequence[float]) -> float:
        """Standard error of `find_mean` over windows."""
        return _join_errors([(share, _standard_error(own)) for share, own in self.group(values)])

    def _mean(self, values: Sequence[float | None]) -> float | None:
        numbers = [v for v in values if v is not None]
        return self.find_mean(numbers) if len(numbers) == len(values) and numbers else None


def _join_errors(errors: Sequence[tuple[float, float]]) -> float:
    """The standard error of a sum of independent parts, (share, standard error) each."""
    if len(errors) == 1 and errors[0][0] == 1:
        return errors[0][1]
    return math.hypot(*(share * error for share, error in errors))


def compare_kl(trial: Evaluation, accepted: Evaluation) -> tuple[float, float]:
    """(mean, standard error) of the trial's KL minus the accepted one's, paired window by window.

    Raises ValueError when either is not finite or they were measured on different windows.
    """
    differences = _pair_kl(trial, accepted)
    return trial.find_mean(differences), trial.find_error(differences)


def compare_perplexity(one: Evaluation, other: Evaluation) -> tuple[float, float]:
    """(mean, standard error) of the logarithm of one's perplexity minus that of the other's, paired window by window.

    Raises ValueError as `compare_kl`.
    """
    differences = _pair(one, other, one.nll, other.nll)
    return one.find_mean(differences), one.find_error(differences)


def _pair_kl(trial: Evaluation, accepted: Evaluation) -> list[float]:
    return _pair(trial, accepted, trial.kl, accepted.kl)


def _pair(
    one: Evaluation, other: Evaluation, figures: Sequence[float | None], others: Sequence[float | None]
) -> list[float]:
    if not (one.finite and other.finite) or len(figures) != len(others) or one.texts != other.texts:
        raise ValueError("only finite evaluations of the same windows can be compared")
    return [a - b for a, b in zip(figures, others, strict=True) if a is not None and b is not None]


def find_likelihood_better(trial: Evaluation, accepted: Evaluation) -> float:
    """The probability that the trial's mean KL is the lower one: of the paired t statistic over windows, one-sided.

    Student's distribution, as the posterior of a mean of normal differences under a flat prior; of a sum over several
    texts with the degrees of freedom of Welch and Satterthwaite, rounded down. 0.5 where all losses are the same.
    Raises ValueError as `compare_kl`.
    """
    change, error = compare_kl(trial, accepted)
    if not error:
        return 0.5 if change == 0 else float(change < 0)
    tail = find_p(change / error, _count_degrees(trial, accepted)) / 2
    return 1 - tail if change < 0 else tail


def _count_degrees(trial: Evaluation, accepted: Evaluation) -> int:
    groups = trial.group(_pair_kl(trial, accepted))
    if len(groups) == 1:
        return len(groups[0][1]) - 1
    variances = [((share * _standard_error(own)) ** 2, len(own) - 1) for share, own in groups]
    spread = sum(variance**2 / degrees for variance, degrees in variances if degrees)
    return max(1, math.floor(sum(variance for variance, _ in variances) ** 2 / spread + 1e-9)) if spread else 1


def join_windows(first: Evaluation, *more: Evaluation) -> Evaluation:
    """The losses on one text after another, weighed as the first."""
    every = (first, *more)
    return Evaluation(
        nll=[x for part in every for x in part.nll],
        kl=[x for part in every for x in part.kl],
        texts=[x for part in every for x in part.texts],
        weights=first.weights,
    )


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
