"""What does each part of pruning cost? `python -m tools.bench --json bench.json --only wanda,obs`

Every figure is a ratio: a part is timed in turn with its reference, in the same process and the same minute, and the
ratio is taken pair by pair. So it holds on another machine better than seconds do, and its spread shows how quiet the
machine was. The defaults take some minutes with a small model; windows and rounds scale them up. The work goes into a
temporary directory (TMPDIR). A missed target is shown, and is no failure of the command.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tools.base.console import carry_out
from tools.base.errors import UserError
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.experiments.speed import BenchSettings
from tools.experiments.speed_suite import BENCHMARKS, STREAM, choose_benchmarks, run_benchmarks
from tools.experiments.speed_workers import run_workers
from tools.results.schema import describe_protocol
from tools.results.speed import Report, show_report, write_report
from tools.statistics.shards import SHARDS


def make_parser() -> argparse.ArgumentParser:
    """What to time, and one flag per field of `BenchSettings`."""
    parser = Parser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="Write all figures there too.")
    parser.add_argument(
        "--only", metavar="NAME,...", default="", help=f"Benchmarks to run: {', '.join(BENCHMARKS)}. Default: all."
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        choices=range(2, SHARDS + 1),
        help="Time only this: profile and validation by N workers of one thread, on Ray, against one of them.",
    )
    parser.add_argument(
        "--stream", action="store_true", help="Time only this: what work takes on a model that comes block by block."
    )
    add_flags(parser, BenchSettings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (what is done is shown), 2 bad input."""
    given = sys.argv[1:] if arguments is None else arguments
    return carry_out(lambda: _obey(given), "stopped")


def _obey(arguments: list[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has room for sentences
    options, flags = parse_flags(make_parser(), BenchSettings, arguments)
    names, settings = choose_benchmarks(options.only), read_options(BenchSettings, flags, None)
    if sum(map(bool, (options.only, options.workers, options.stream))) > 1:
        raise UserError("--workers, --stream and --only exclude one another")
    if options.stream:
        names, settings = [STREAM], settings.model_copy(update={"device": "stream"})
    report = Report(
        settings=settings.model_dump(),
        device="cpu",
        threads=torch.get_num_threads(),
        versions=describe_protocol(settings, "validation").versions,
    )
    try:
        _run(options, names, settings, report, console)
    finally:
        if report.results:
            show_report(report, console)


def _run(
    options: argparse.Namespace, names: Sequence[str], settings: BenchSettings, report: Report, console: Console
) -> None:
    path = Path(options.json) if options.json else None
    if options.workers:
        report.results += run_workers(settings, options.workers, console)
        write_report(report, path)
    else:
        run_benchmarks(settings, names, path, report, console)


if __name__ == "__main__":
    sys.exit(main())
