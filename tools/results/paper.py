"""A comparison as arXiv 2601.09694 makes it: what is left of perplexity, MMLU and FreebaseQA beside the baselines."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.base.words import show, show_score
from tools.plans.jobs import is_ours
from tools.results.losses import Result, find_differences, name_score, subtract
from tools.results.schema import Score
from tools.results.tables import list_table, list_task_protocols

PRESETS: dict[str, dict[str, str]] = {
    "paper": {
        "recipes": "wanda:uniform,sparsegpt:uniform,refit:kappa,structured:flap,structured:depth",
        "sparsity": "0.45,2:4",
        "tasks": "mmlu,freebaseqa",
    }
}
"""Fields of a comparison by the name of a preset: the baselines of the paper at its sparsity, and its tasks."""

OURS = "refit:kappa"
"""Billhook's own recipe, in one shot."""

ABOUT = 0.01
"""Sparsities nearer than this stand beside one another: parts that go whole come as near as they can."""

MMLU, FREEBASEQA = ("mmlu", "acc"), ("freebaseqa", "exact_match")
"""Task and metric of the paper's two accuracies."""

LOGPROB = ("freebaseqa", "logprob")
"""Ours beside them, for models too small to say the answers."""

PUBLISHED = ("published, agents on Qwen3-4B and 8B beside structured baselines", "+56 %", "19 ×", "−69 %", "")
"""The three figures of the paper's abstract, and none for what it does not count."""


class Measured(NamedTuple):
    """One model of the table."""

    name: str
    recipe: str
    """Empty for the dense model."""
    pattern: str
    sparsity: float
    perplexity: float | None
    scores: Sequence[Score]
    answers: Mapping[str, list[float]] = {}
    """By task and metric, what each question came to, where that is known."""

    def find(self, task: tuple[str, str]) -> Result | None:
        """The score of a task and metric, with its answers; None where it was not asked."""
        score = next((score for score in self.scores if (score.task, score.metric) == task), None)
        return Result(score=score, values=self.answers.get(name_score(score), [])) if score else None

    def figure(self, task: tuple[str, str]) -> float | None:
        """The figure of a task and metric; None where it was not measured or not finite."""
        found = self.find(task)
        return found.score.value if found else None

    def differ(self, other: "Measured", task: tuple[str, str]) -> str:
        """How much higher its figure is than another model's, ± the standard error question by question; empty where
        the answers to each are not known, or were not asked for alike."""
        own, theirs = self.find(task), other.find(task)
        if own is None or theirs is None or find_differences(own.score.protocol, theirs.score.protocol):
            return ""
        difference = subtract(own, theirs)
        if difference is None or not difference.paired or difference.error is None:
            return ""
        return f"{difference.value:+.4f} ± {difference.error:.4f}".replace("-", "−")


def describe_tasks(dense: Measured, rows: Sequence[Measured]) -> list[str]:
    """Markdown: the tasks' figures of every model, Billhook's relative to each baseline, and how they were measured.

    Nothing where no task was asked.
    """
    if not dense.scores:
        return []
    keys = [(score.task, score.metric) for score in dense.scores]
    cells = []
    for row in (dense, *rows):
        figures = [_show_figure(row, dense, key) for key in keys]
        cells.append([row.name, f"{row.sparsity:.2%}", show(row.perplexity), *figures])
    return [
        "## Tasks",
        "",
        "Asked by lm-evaluation-harness; ± one standard error."
        + (" In brackets: less the dense model's, question by question." if dense.answers else ""),
        "",
        *list_table(["model", "sparsity", "perplexity", *map(" ".join, keys)], cells, left=1),
        "",
        *_describe_relative(dense, rows),
        *list_task_protocols(list(dense.scores)),
        "",
    ]


def _show_figure(row: Measured, dense: Measured, key: tuple[str, str]) -> str:
    found = row.find(key)
    if found is None:
        return ""
    difference = "" if row is dense else row.differ(dense, key)
    return show_score(found.score.value, found.score.error) + (f" ({difference})" if difference else "")


def _describe_relative(dense: Measured, rows: Sequence[Measured]) -> list[str]:
    """A table for each sparsity; baselines with a pattern stand in all of them, as the paper's do."""
    if dense.figure(MMLU) is None or dense.figure(FREEBASEQA) is None:
        return []
    baselines = [row for row in rows if not is_ours(row.recipe)]
    lines: list[str] = []
    for ours in (row for row in rows if row.recipe == OURS and not row.pattern):
        beside = [row for row in baselines if row.pattern or abs(row.sparsity - ours.sparsity) < ABOUT]
        lines += _relate(ours, beside, dense) if beside else []
    return lines


def _relate(ours: Measured, baselines: Sequence[Measured], dense: Measured) -> list[str]:
    cells = [(row.name, *compare_with(ours, row, dense)) for row in baselines]
    return [
        f"## `{OURS}` at {ours.sparsity:.2%} beside the baselines, as arXiv 2601.09694 counts",
        "",
        "MMLU: accuracy beside the baseline's, and in brackets less it, question by question. FreebaseQA: how many "
        "times the baseline's share of the dense model's right answers is retained. Perplexity, and the "
        "log-probability of the right answers: what is lost of the dense model's beside what the baseline loses. The "
        "published line is of other models, and of other baselines.",
        "",
        *list_table(
            [f"`{OURS}` beside", "MMLU", "FreebaseQA", "perplexity lost", "log-probability lost"],
            [*cells, [f"*{figure}*" if figure else "" for figure in PUBLISHED]],
            left=1,
        ),
        "",
    ]


def compare_with(ours: Measured, baseline: Measured, dense: Measured) -> tuple[str, str, str, str]:
    """The paper's three figures and ours in words; a dash where one cannot be had."""
    accuracy, their_accuracy = ours.figure(MMLU), baseline.figure(MMLU)
    gain = f"{accuracy / their_accuracy - 1:+.1%}" if accuracy is not None and their_accuracy else "–"
    gain += f" ({apart})" if (apart := ours.differ(baseline, MMLU)) else ""
    answers, their_answers = ours.figure(FREEBASEQA), baseline.figure(FREEBASEQA)
    retained = "–"
    if answers is not None and their_answers is not None:
        retained = f"{answers / their_answers:.1f} ×" if their_answers else f"{answers:.2%} beside none"
    perplexity = _compare_losses(dense.perplexity, ours.perplexity, baseline.perplexity, sign=1)
    logprob = _compare_losses(*(row.figure(LOGPROB) for row in (dense, ours, baseline)), sign=-1)
    return gain, retained, perplexity, logprob


def _compare_losses(dense: float | None, ours: float | None, theirs: float | None, *, sign: int) -> str:
    """How much more or less is lost than the baseline loses; `sign` is 1 for what grows when something is lost."""
    if ours is None or theirs is None or dense is None or sign * (theirs - dense) <= 0:
        return "–"
    return f"{(ours - dense) / (theirs - dense) - 1:+.1%}".replace("-", "−")
