"""Models on tasks as `tools.evaluate` keeps and shows them: evaluate.json, .csv and .md, and the table. No torch."""

from pathlib import Path

from pydantic import BaseModel, Field
from rich.table import Table
from rich.text import Text

from tools.base.files import write_text
from tools.base.rows import as_csv, write_kept
from tools.base.words import escape, show_score
from tools.results.losses import Result, find_differences, subtract
from tools.results.tables import list_table, list_task_protocols


class Row(BaseModel):
    """One model on one task."""

    model: str
    task: str = Field(description="As it was asked for; a tag of the harness stands for several tasks.")
    files: str = Field("", description="Hash of the model's files; empty of a hub id.")
    results: list[Result]


class Figures(BaseModel):
    """`evaluate.json`."""

    rows: list[Row] = []


class Line(BaseModel):
    """A line of the tables."""

    model: str
    task: str
    metric: str
    value: float | None = Field(description="Null where it was not finite.")
    error: float | None = Field(description="Standard error of value.")
    samples: int
    difference: float | None = Field(description="To the first model; null for the first itself.")
    difference_error: float | None = Field(description="Standard error of difference.")
    paired: bool | None = Field(description="Whether that is of the differences question by question.")


def list_lines(known: Figures) -> list[Line]:
    """Every figure with its difference to the first model's, where both were asked alike: what tokenizers and lengths
    of models make another protocol of is known once they have answered."""
    results = [result for row in known.rows for result in row.results]
    firsts: dict[tuple[str, str], Result] = {}
    lines = []
    for result in results:
        score = result.score
        first = firsts.setdefault((score.task, score.metric), result)
        alike = first is not result and not find_differences(first.score.protocol, score.protocol)
        gap = subtract(result, first) if alike else None
        lines.append(
            Line(
                **score.model_dump(include={"model", "task", "metric", "value", "error", "samples"}),
                difference=gap.value if gap else None,
                difference_error=gap.error if gap else None,
                paired=gap.paired if gap else None,
            )
        )
    return sorted(lines, key=lambda line: list(firsts).index((line.task, line.metric)))


_HEADER = ("task", "metric", "model", "figure", "to the first", "questions")


def _list_cells(line: Line) -> list[str]:
    gap = ""
    if line.difference is not None:
        error = "" if line.difference_error is None else f" ± {line.difference_error:.4f}"
        gap = f"{line.difference:+.4f}{error}{'' if line.paired else ' (unpaired)'}"
    return [line.task, line.metric, line.model, show_score(line.value, line.error), gap, str(line.samples)]


def describe_line(line: Line) -> str:
    """A figure in one line, for people."""
    task, metric, model, figure, gap, questions = _list_cells(line)
    count = f"{questions} question{'' if line.samples == 1 else 's'}"
    return f"{task} {metric}: {figure} {model}, {count}{f'; {gap} to the first' if gap else ''}"


def make_table(known: Figures) -> Table:
    """The figures for a terminal."""
    table = Table()
    for i, title in enumerate(_HEADER):
        table.add_column(title, justify="right" if i > 2 else "left")
    for line in list_lines(known):
        table.add_row(*map(Text, _list_cells(line)))
    return table


def describe(known: Figures) -> str:
    """`evaluate.md`."""
    lines = [
        "# Tasks of lm-evaluation-harness",
        "",
        "± one standard error. To the first: the difference to the first model of the same task, ± the standard error "
        "of the differences question by question; where the harness gives no value for each question, of two "
        "independent figures (unpaired); nothing where the two were not asked alike, as the protocol says.",
        "",
        *list_table(_HEADER, [[*map(escape, _list_cells(line))] for line in list_lines(known)], left=3),
        "",
        "## Protocol",
        "",
        *list_task_protocols([result.score for row in known.rows for result in row.results]),
        "",
    ]
    return "\n".join(lines)


def write_figures(directory: Path, known: Figures) -> None:
    """evaluate.json, .md and .csv in a directory."""
    write_kept(directory / "evaluate.json", known)
    write_text(directory / "evaluate.md", describe(known))
    write_text(directory / "evaluate.csv", as_csv(Line, list_lines(known)))
