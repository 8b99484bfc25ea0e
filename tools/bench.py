"""What does each part of pruning cost? `python -m tools.bench --only passes,updates`

Every figure is a ratio: a part is timed in turn with its reference, in the same process and the same minute, and the
ratio is taken pair by pair. Its spread shows how quiet the machine was. With --workers N it is the work
of N workers that is timed, beside one of them. The work goes into a temporary directory (TMPDIR).
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tools.base.console import carry_out, print_line
from tools.base.errors import UserError
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.base.progress import ignore_progress
from tools.experiments.speed import BENCHMARKS, SPARSITY, BenchSettings, Result, Site, bench_workers
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench, use_workbench


def _choose(bench: Workbench, only: list[str]) -> Mapping[str, Callable[[Site], Iterator[Result]]]:
    """What is timed of this model. Raises UserError where it cannot be."""
    if any(zeros >= SPARSITY for zeros in bench.weights.sparsities()):
        raise UserError(f"a layer is {SPARSITY:.0%} zero already; the benchmarks prune a dense model")
    if not bench.profiles.keeps_moments:
        raise UserError("the disk is too small for second moments; free some, or set another TMPDIR")
    if bench.crew.cluster is not None:
        return {"workers": bench_workers}
    return {name: task for name, task in BENCHMARKS.items() if name in only or not only}


def _make_table(results: list[Result]) -> Table:
    """Medians over the rounds, and under a ratio its least and greatest."""
    table = Table(show_lines=True)
    for title in ("benchmark", "what is timed, and against what"):
        table.add_column(title)
    for title in ("seconds", "ratio"):
        table.add_column(title, justify="right")
    for result in results:
        ratios = [ours / other for ours, other in zip(result.seconds, result.reference_seconds, strict=True)]
        medians = statistics.median(result.seconds), statistics.median(result.reference_seconds)
        spread = f"{statistics.median(ratios):.3g}\n{min(ratios):.3g} to {max(ratios):.3g} of {len(ratios)}"
        what = f"{result.what}\nagainst {result.reference}"
        table.add_row(result.name, what, " / ".join(f"{seconds:.3g}" for seconds in medians), spread)
    return table


def _run(arguments: list[str]) -> None:
    console, results = Console(width=None if sys.stdout.isatty() else 160), list[Result]()
    parser = Parser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--only", metavar="NAME,...", default="", help=f"Of {', '.join(BENCHMARKS)}. Default: all.")
    add_flags(parser, BenchSettings)
    options, flags = parse_flags(parser, BenchSettings, arguments)
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := sorted({*only} - {*BENCHMARKS}):
        raise UserError(f"there is no benchmark {unknown[0][:80]!r}; choose from {', '.join(BENCHMARKS)}")
    settings = read_options(BenchSettings, flags, None)
    if only and settings.workers:
        raise UserError("--only goes without --workers, of which profile and validation are timed")

    def warn(text: str) -> None:
        print_line(console, f"warning: {text}")

    try:
        with tempfile.TemporaryDirectory(prefix="billhook-bench-") as directory, console.status("load model") as status:
            try:
                with use_workbench(settings, Path(directory), warn, ignore_progress) as bench:
                    site = Site(bench, settings)
                    for name, task in _choose(bench, only).items():
                        status.update(name)
                        results.extend(task(site))
            finally:
                close_workbench()
    finally:
        if results:
            print_line(console, f"{settings.model}, {settings.dtype}, {torch.get_num_threads()} threads")
            console.print(_make_table(results))


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (what is done is shown), 2 bad input."""
    given = sys.argv[1:] if arguments is None else arguments
    return carry_out(lambda: _run(given), "stopped")


if __name__ == "__main__":
    sys.exit(main())
