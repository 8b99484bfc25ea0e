"""Tasks of lm-evaluation-harness on checkpoints of the workbench, each asked once."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from tools.base.files import read_json, write_json
from tools.base.progress import Progress
from tools.base.settings import TaskSettings
from tools.measure.benchmarks import Benchmark, differ_from, load_benchmarks
from tools.measure.harness import run_benchmark, warn_of_cut_prompts
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
