"""The speed of several workers on Ray, beside one of them."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tools.base.progress import ignore_progress
from tools.base.settings import TeamSettings, WorkbenchSettings
from tools.experiments.speed import OTHER_SPARSITY, SPARSITY, BenchSettings, Task, time_in_turn
from tools.plans.allocate import allocate
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation
from tools.results.speed import Result, compare_rounds
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench, use_workbench


def bench_workers(bench: Workbench, settings: BenchSettings, workers: int) -> list[Result]:
    """Profile and validation by several workers, against the same by one of them."""
    cluster = bench.cluster
    assert cluster is not None
    profile = bench.profile(ignore_progress)
    layers = bench.read_profile(profile).layers
    recipe = Recipe(method="wanda", refit=False, allocation="uniform", statistics="dense")
    one, other = (
        bench.prune(profile, order_allocation(recipe, allocate(layers, share, recipe)), ignore_progress)
        for share in (SPARSITY, OTHER_SPARSITY)
    )
    busy: dict[tuple[str, int], float] = {}

    def validate(checkpoint: str) -> None:
        for path in (bench.directory / "evaluations").glob("*.json"):
            path.unlink()
        bench.evaluate(checkpoint, "validation", profile, ignore_progress)

    def task(name: str, count: int, run: Callable[[], object]) -> Task:
        def prepare() -> None:
            cluster.use(workers)
            validate(other)  # so that no block's weights are those that the task begins with
            bench.restore(one)  # as after a prune; layers have yet to travel to the workers
            cluster.use(count)
            cluster.take_busy_seconds()

        def work() -> None:
            run()
            busy[name, count] = cluster.take_busy_seconds()

        return Task(work, prepare)

    results = []
    tasks: dict[str, Callable[[], object]] = {
        "profile": lambda: bench.profile(ignore_progress),
        "validation": lambda: validate(one),
    }
    for name, run in tasks.items():
        several, alone = time_in_turn([task(name, count, run) for count in (workers, 1)], settings)
        outside = 1 - busy[name, workers] / (workers * several[-1])
        what = f"{name} by {workers} workers of one thread each; {outside:.0%} of their time was not spent on the text"
        peak = bench.peak_memory_bytes()
        results.append(compare_rounds(f"workers/{name}", what, several, "the same by one of them", alone, None, peak))
    return results


def run_workers(settings: BenchSettings, workers: int, console: Console) -> list[Result]:
    """`bench_workers`, in a temporary directory. Raises UserError without Ray, or where it cannot be begun."""
    team = TeamSettings.model_validate(
        settings.model_dump(include=set(WorkbenchSettings.model_fields))
        | {"workers": str(workers), "worker_threads": 1}
    )

    def warn(text: str) -> None:
        console.print(f"warning: {text}", highlight=False, markup=False)

    with tempfile.TemporaryDirectory(prefix="billhook-bench-") as directory, console.status("workers"):
        try:
            with use_workbench(team, Path(directory), warn, ignore_progress) as bench:
                return bench_workers(bench, settings, workers)
        finally:
            close_workbench()
