"""Models asked tasks of lm-evaluation-harness, one after another; what is done is on disk after each task."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field
from rich.console import Console

from tools.base.console import print_line, show_bars
from tools.base.errors import UserError
from tools.base.files import read_json, write_json
from tools.base.progress import Progress
from tools.base.rows import lock_out, read_kept
from tools.base.settings import LoadSettings, TaskSettings, TeamSettings
from tools.measure.benchmarks import Benchmark, differ_from, load_benchmarks
from tools.measure.harness import run_benchmark, warn_of_cut_prompts
from tools.models.load import (
    check_device,
    choose_device,
    find_model,
    hash_model,
    load_model,
)
from tools.results.evaluation import Figures, Row, write_figures
from tools.results.losses import Result, compare_scores
from tools.results.schema import Score

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench


class Results(BaseModel):
    """What is kept of one model on one task."""

    results: list[Result]


def measure_checkpoints(
    bench: "Workbench",
    settings: TaskSettings,
    checkpoints: dict[str, str],
    progress: Progress,
) -> list[Score]:
    """The tasks on checkpoints of the workbench, by label; each is asked once, then read back.

    The last checkpoint asked stays in the model. Raises UserError where the tasks cannot be loaded.
    """
    scores: list[Score] = []
    benchmarks = load_benchmarks(settings, bench.settings.dtype)
    for label, checkpoint in checkpoints.items():
        for benchmark in benchmarks:
            path = bench.directory / "evaluations" / f"{benchmark.name}-{checkpoint[:16]}.json"
            results = _read_kept(path, benchmark, label)
            if results is None:
                bench.pruner.restore(checkpoint)
                results = run_benchmark(benchmark, bench.model, bench.tokenizer, label, progress)
                write_json(path, Results(results=results).model_dump())
            warn_of_cut_prompts(results, bench.warn)
            scores += [result.score for result in results]
    compare_scores(scores)
    return scores


def _read_kept(path: Path, benchmark: Benchmark, label: str) -> list[Result] | None:
    """What was measured before by the same protocol, under the label that it has now."""
    try:
        results = Results.model_validate(read_json(path, "it is measured again")).results
    except (OSError, ValueError):
        return None
    if any(differ_from(result.score, benchmark) for result in results):
        return None
    return [Result(score=r.score.model_copy(update={"model": label}), values=r.values) for r in results]


class EvaluateSettings(TaskSettings, LoadSettings):
    """How the models are loaded, and what they are asked."""

    out: str = Field("evaluate", min_length=1, description="Directory of the figures and the tables.")


def evaluate(models: list[str], settings: EvaluateSettings, console: Console) -> Figures:
    """Ask what was not asked yet, under bars on the console; everything is on disk after each task. Of a run it is its
    model that is asked.

    Raises UserError for bad input, and when what is kept in `--out` was measured by another protocol.
    """
    models = list(dict.fromkeys(map(find_model, models)))
    check_device(settings.device)
    if not settings.tasks:
        raise UserError("no task is given; try --tasks mmlu,freebaseqa")
    benchmarks = load_benchmarks(settings, settings.dtype)
    directory = Path(settings.out)
    lock_out(directory, directory)
    known = read_kept(directory / "evaluate.json", Figures) or Figures()
    _refuse_other_protocols(directory, known, benchmarks)
    files = {model: hash_model(model) for model in models}
    for changed in _drop_changed(known, files):
        print_line(console, f"{changed} is another than when it was asked, and is asked again")
    wanted = [(model, benchmark.name) for model in models for benchmark in benchmarks]
    done = {(row.model, row.task) for row in known.rows}
    with show_bars(console, len(wanted)) as (begin, progress):
        for model in models:
            todo = [benchmark for benchmark in benchmarks if (model, benchmark.name) not in done]
            begin(model, sum(key in done for key in wanted))
            for row in _ask_model(model, todo, settings, progress) if todo else ():
                row.files = files[model]
                known.rows.append(row)
                done.add((row.model, row.task))
                begin(model, sum(key in done for key in wanted))
                write_figures(directory, known)
                warn_of_cut_prompts(row.results, lambda text: print_line(console, f"warning: {text}"))
            gc.collect()  # the next model may need the room of this one
    known.rows.sort(key=lambda row: wanted.index(key) if (key := (row.model, row.task)) in wanted else len(wanted))
    write_figures(directory, known)
    return known


def _drop_changed(known: Figures, files: dict[str, str]) -> list[str]:
    """Drop the figures of models whose files are others since; their names."""
    changed = [row for row in known.rows if row.files and row.files != files.get(row.model, row.files)]
    known.rows = [row for row in known.rows if row not in changed]
    return list(dict.fromkeys(row.model for row in changed))


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
    model: str, benchmarks: list[Benchmark], settings: EvaluateSettings, progress: Progress
) -> Iterator[Row]:
    """A row as soon as a task is done; the model is let go with the last."""
    progress("load model", 0, 1)
    load = settings.model_dump(include=set(LoadSettings.model_fields))
    loaded, tokenizer = load_model(choose_device(TeamSettings(model=model, **load)), Path(settings.out))
    for benchmark in benchmarks:
        results = run_benchmark(benchmark, loaded, tokenizer, model, progress)
        yield Row(model=model, task=benchmark.name, results=results)
