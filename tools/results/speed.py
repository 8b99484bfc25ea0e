"""What `tools.bench` found: its JSON, and its table. No torch in here."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from tools.base.files import explain_unwritable, write_json
from tools.base.words import show_size


class Result(BaseModel):
    """One thing timed against another."""

    name: str = Field(description="The benchmark, then what distinguishes its rows.")
    what: str = Field(description="What was timed.")
    reference: str = Field(description="What it was timed against.")
    seconds: list[float] = Field(description="Of each round.")
    reference_seconds: list[float]
    ratio: float = Field(description="Median over the rounds of seconds / reference_seconds.")
    low: float = Field(description="The least of these ratios.")
    high: float = Field(description="The greatest.")
    target: float | None = Field(description="What the ratio should not exceed; null where nothing was promised.")
    peak_memory_bytes: int = Field(description="The most memory that the process had used by then.")


class Report(BaseModel):
    """`--json`."""

    settings: dict[str, Any]
    device: str
    threads: int = Field(description="Threads that torch uses on the processor.")
    versions: dict[str, str]
    results: list[Result] = []


def compare_rounds(
    name: str,
    what: str,
    seconds: Sequence[float],
    reference: str,
    reference_seconds: Sequence[float],
    target: float | None,
    peak_memory_bytes: int,
) -> Result:
    """The result of two tasks timed in the same rounds."""
    ratios = [taken / other for taken, other in zip(seconds, reference_seconds, strict=True)]
    return Result(
        name=name,
        what=what,
        reference=reference,
        seconds=list(seconds),
        reference_seconds=list(reference_seconds),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=target,
        peak_memory_bytes=peak_memory_bytes,
    )


def write_report(report: Report, path: Path | None) -> None:
    """The JSON, where it is asked for. Raises UserError where it cannot be written."""
    if path is None:
        return
    with explain_unwritable(path):
        write_json(path, report.model_dump())


def show_report(report: Report, console: Console) -> None:
    """The results as a table: medians over the rounds, and under a ratio its least and greatest and their number."""
    table = Table(show_lines=True)
    table.add_column("benchmark", no_wrap=True)
    table.add_column("what is timed, and against what")
    for title in ("seconds", "ratio", "at most", "peak"):
        table.add_column(title, justify="right")
    for result in report.results:
        medians = statistics.median(result.seconds), statistics.median(result.reference_seconds)
        table.add_row(
            result.name,
            f"{result.what}\nagainst {result.reference}",
            " / ".join(f"{seconds:.3g}" for seconds in medians),
            f"{result.ratio:.3g}\n{result.low:.3g} to {result.high:.3g} of {len(result.seconds)}",
            describe_target(result),
            show_size(result.peak_memory_bytes, "GB", 2),
        )
    console.print(f"{report.settings['model']}, {report.settings['dtype']}, {report.device}, {report.threads} threads")
    console.print(table)


def describe_target(result: Result) -> str:
    """The target, and whether it was met; empty where there is none."""
    if result.target is None:
        return ""
    return f"{result.target:.3g} ({'met' if result.ratio <= result.target else 'missed'})"
