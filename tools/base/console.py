"""What commands share on a terminal: exit codes, bars and lines. No torch in here."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBars
from rich.text import Text

from tools.base.errors import DamagedArtifact, UserError
from tools.base.options import refuse
from tools.base.progress import Progress, name_step
from tools.base.secrets import read_secrets

STOPPED = "stopped; the rows that are done are kept, and the same command goes on"
UNWRITTEN = "stopped; nothing was written"


def carry_out(work: Callable[[], object], stopped: str = STOPPED) -> int:
    """The exit code of a command: 0 done, 1 interrupted, which `stopped` tells, 2 bad input, which is told.

    SIGTERM interrupts as Ctrl-C does, so that nothing that was started stays behind. Keys of `.env` are there for the
    work, and none of them stays in what it writes.
    """
    try:
        read_secrets()
        with _interrupted_by(signal.SIGTERM):
            work()
    except UserError as error:
        return refuse(error)
    except DamagedArtifact as error:
        return refuse(f"{error}; begin again with another --out")
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 1
    return 0


@contextmanager
def _interrupted_by(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def show_bars(console: Console, total: int) -> Iterator[tuple[Callable[[str, int], None], Progress]]:
    """(begin a row: its title, rows before it; show a step's progress) under two bars; without a terminal, nothing."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with ProgressBars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        rows = bars.add_task("", total=total)
        present = bars.add_task("", total=None)

        def begin(title: str, before: int) -> None:
            bars.update(rows, description=title, completed=before)

        def show_step(label: str, done: int, total: int) -> None:
            if name_step(bars.tasks[present].description) != name_step(label):
                bars.reset(present)
            bars.update(present, description=label, completed=done, total=total)

        yield begin, show_step


@contextmanager
def show_bar(console: Console) -> Iterator[Progress]:
    """Show a step's progress in one bar; without a terminal, nothing."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with ProgressBars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        yield lambda label, at, total: bars.update(task, description=label, completed=at, total=total)


def print_line(console: Console, line: str) -> None:
    """Neither wrapped nor coloured."""
    console.print(Text(line), soft_wrap=True)
