"""All benchmarks of one opened model by name, run one after another."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.base.settings import NO_STREAMED_POLISH
from tools.experiments.speed import OTHER_SPARSITY, BenchSettings, Site
from tools.experiments.speed_plans import bench_allocation
from tools.experiments.speed_polish import bench_polish
from tools.experiments.speed_pruning import bench_masks, bench_obs, bench_refit
from tools.experiments.speed_statistics import bench_kappa_of_method, bench_profile, bench_wanda
from tools.experiments.speed_streamed import bench_stream
from tools.experiments.speed_validation import bench_validation
from tools.results.speed import Report, Result, write_report
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench, use_workbench

BENCHMARKS: dict[str, Callable[[Site], list[Result]]] = {
    "wanda": bench_wanda,
    "profile": bench_profile,
    "kappa-of-method": bench_kappa_of_method,
    "masks": bench_masks,
    "obs": bench_obs,
    "refit": bench_refit,
    "allocation": bench_allocation,
    "validation": bench_validation,
    "polish": bench_polish,
}

STREAM = "stream"


def choose_benchmarks(only: str) -> list[str]:
    """The names asked for, in the order of BENCHMARKS; all for "". Raises UserError in one line for an unknown one."""
    asked = {name.strip() for name in only.split(",") if name.strip()}
    for name in sorted(asked - set(BENCHMARKS)):
        raise UserError(f"there is no benchmark {name[:80]!r}; choose from {', '.join(BENCHMARKS)}")
    return [name for name in BENCHMARKS if name in asked or not asked]


def run_benchmarks(
    settings: BenchSettings, names: Sequence[str], path: Path | None, report: Report, console: Console
) -> None:
    """Run benchmarks one after another into the report; `path` is written after each. Raises UserError.

    `STREAM` is a name, too, which is not among the others: it is of a model that is streamed.
    """

    def warn(text: str) -> None:
        console.print(f"warning: {text}", highlight=False, markup=False)

    write_report(report, path)  # before minutes of work: can it be written at all?
    with tempfile.TemporaryDirectory(prefix="billhook-bench-") as directory, console.status("load model") as status:
        try:
            with use_workbench(settings, Path(directory), warn, ignore_progress) as bench:
                _refuse_sparse(bench)
                _refuse_small_disk(bench)
                if "polish" in names and bench.layers[0].is_streamed:
                    raise UserError(f"polish: {NO_STREAMED_POLISH}; leave it out with --only, or use another --device")
                site = Site(bench, settings)
                if bench.device.type == "cuda":
                    report.device = torch.cuda.get_device_name(bench.device)
                for name in names:
                    status.update(name)
                    report.results += {**BENCHMARKS, STREAM: bench_stream}[name](site)
                    write_report(report, path)
        finally:
            close_workbench()


def _refuse_small_disk(bench: Workbench) -> None:
    if not bench.profiles.keeps_moments:
        raise UserError(
            "the disk is too small for second moments, which benchmarks keep; free some, or set another TMPDIR"
        )


def _refuse_sparse(bench: Workbench) -> None:
    for layer, zeros in zip(bench.layers, bench.sparsities(), strict=True):
        if zeros > OTHER_SPARSITY:
            raise UserError(f"layer {layer.name} is {zeros:.0%} zero already; the benchmarks prune a dense model")
