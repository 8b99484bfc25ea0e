"""What does a model know? `python -m tools.evaluate MODEL [MODEL…] --tasks mmlu,freebaseqa --limit 50 --out DIR`

Asks each model the tasks of lm-evaluation-harness, and writes evaluate.json, .csv and .md: figures with standard
errors, and how far every further model is from the first. MODEL is a hub id, a directory (such as a run's model/), a
.gguf file or package:NAME. Figures that are done are kept on Ctrl-C; the same command goes on.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.base.console import carry_out, print_line, show_bars
from tools.base.errors import UserError
from tools.base.files import write_json, write_text
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.base.rows import as_csv, lock_out, read_kept
from tools.base.secrets import read_secrets
from tools.base.settings import LoadSettings, TaskSettings, WorkbenchSettings
from tools.base.words import escape, show_score
from tools.measure.benchmarks import (
    Benchmark,
    Result,
    compare_scores,
    differ_from,
    load_benchmarks,
    run_benchmark,
    subtract,
    warn_of_cut_prompts,
)
from tools.models.load import check_device, load_model, locate_model
from tools.results.schema import list_task_protocols

if TYPE_CHECKING:
    from tools.base.progress import Progress


class EvaluateSettings(TaskSettings, LoadSettings):
    """How the models are loaded, and what they are asked."""

    out: str = Field("evaluate", min_length=1, description="Directory of the figures and the tables.")


class Row(BaseModel):
    """One model on one task."""

    model: str
    task: str = Field(description="As it was asked for; a tag of the harness stands for several tasks.")
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


def evaluate(models: list[str], settings: EvaluateSettings, console: Console) -> Figures:
    """Ask what was not asked yet and print a line for each figure; everything is on disk after each task.

    Raises UserError for bad input, and when what is kept in `--out` was measured by another protocol.
    """
    models = list(dict.fromkeys(models))
    for model in models:
        locate_model(model)
    check_device(settings.device)
    if not settings.tasks:
        raise UserError("no task is given; try --tasks mmlu,freebaseqa")
    benchmarks = load_benchmarks(settings, settings.dtype)
    directory = Path(settings.out)
    lock_out(directory, directory)
    known = read_kept(directory / "evaluate.json", Figures) or Figures()
    _refuse_other_protocols(directory, known, benchmarks)
    wanted = [(model, benchmark.name) for model in models for benchmark in benchmarks]
    done = {(row.model, row.task) for row in known.rows}
    with show_bars(console, len(wanted)) as (begin, progress):
        for model in models:
            todo = [benchmark for benchmark in benchmarks if (model, benchmark.name) not in done]
            begin(model, sum(key in done for key in wanted))
            for row in _ask_model(model, todo, settings, progress) if todo else ():
                known.rows.append(row)
                done.add((row.model, row.task))
                begin(model, sum(key in done for key in wanted))
                _write(directory, known)
                warn_of_cut_prompts(row.results, lambda text: print_line(console, f"warning: {text}"))
            gc.collect()  # the next model may need the room of this one
    known.rows.sort(key=lambda row: wanted.index(key) if (key := (row.model, row.task)) in wanted else len(wanted))
    _write(directory, known)
    for line in list_lines(known):
        print_line(console, _describe_line(line))
    if console.is_terminal:
        console.print(_make_table(known))
    print_line(console, f"see {directory / 'evaluate.md'}")
    return known


def _refuse_other_protocols(directory: Path, known: Figures, benchmarks: list[Benchmark]) -> None:
    by_name = {benchmark.name: benchmark for benchmark in benchmarks}
    for row in known.rows:
        for result in row.results:
            if row.task in by_name and (differing := differ_from(result.score, by_name[row.task])):
                raise UserError(
                    f"{directory} holds figures of {row.task} by another protocol ({', '.join(differing)}); "
                    "choose another --out"
                )


def _ask_model(
    model: str, benchmarks: list[Benchmark], settings: EvaluateSettings, progress: "Progress"
) -> Iterator[Row]:
    """A row as soon as a task is done; the model is let go with the last."""
    progress("load model", 0, 1)
    load = settings.model_dump(include=set(LoadSettings.model_fields))
    loaded, tokenizer = load_model(WorkbenchSettings(model=model, **load))
    for benchmark in benchmarks:
        results = run_benchmark(benchmark, loaded, tokenizer, model, progress)
        yield Row(model=model, task=benchmark.name, results=results)


# --- what is shown and written -------------------------------------------------------------------------------------


def list_lines(known: Figures) -> list[Line]:
    """Every figure with its difference to the first model's. Raises UserError when protocols differ."""
    results = [result for row in known.rows for result in row.results]
    compare_scores(result.score for result in results)
    firsts: dict[tuple[str, str], Result] = {}
    lines = []
    for result in results:
        score = result.score
        first = firsts.setdefault((score.task, score.metric), result)
        gap = None if first is result else subtract(result, first)
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


def _describe_line(line: Line) -> str:
    task, metric, model, figure, gap, questions = _list_cells(line)
    count = f"{questions} question{'' if line.samples == 1 else 's'}"
    return f"{task} {metric}: {figure} {model}, {count}{f'; {gap} to the first' if gap else ''}"


def _make_table(known: Figures) -> Table:
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
        "independent figures (unpaired).",
        "",
        f"| {' | '.join(_HEADER)} |",
        f"|---|---|---|{'---:|' * 3}",
        *(f"| {' | '.join(escape(cell) for cell in _list_cells(line))} |" for line in list_lines(known)),
        "",
        "## Protocol",
        "",
        *list_task_protocols([result.score for row in known.rows for result in row.results]),
        "",
    ]
    return "\n".join(lines)


def _write(directory: Path, known: Figures) -> None:
    write_json(directory / "evaluate.json", known.model_dump())
    write_text(directory / "evaluate.md", describe(known))
    write_text(directory / "evaluate.csv", as_csv(Line, list_lines(known)))


# --- the command ---------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The models, and one flag per field of `EvaluateSettings`."""
    parser = Parser(
        prog="python -m tools.evaluate",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="A model, named as for a run.")
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; a run's config will do.")
    add_flags(parser, EvaluateSettings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (the same command goes on), 2 bad input."""
    read_secrets()
    given = sys.argv[1:] if arguments is None else arguments
    return carry_out(lambda: _obey(given))


def _obey(arguments: list[str]) -> None:
    options, flags = parse_flags(make_parser(), EvaluateSettings, arguments)
    path = Path(options.config) if options.config else None
    evaluate(options.models, read_options(EvaluateSettings, flags, path, ignore_unknown=True), Console())


if __name__ == "__main__":
    sys.exit(main())
