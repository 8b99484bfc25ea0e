"""What commands share that make a table row by row and go on where they stopped. No torch in here."""

import csv
import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBars
from rich.text import Text

from tools.base.errors import DamagedArtifact, UserError
from tools.base.options import refuse
from tools.base.rundir import lock_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tools.base.progress import Progress

Model = TypeVar("Model", bound=BaseModel)


def carry_out(work: Callable[[], object]) -> int:
    """The exit code of a command: 0 done, 1 interrupted (the same command goes on), 2 bad input, which is told.

    SIGTERM interrupts as Ctrl-C does, so that nothing that was started stays behind.
    """
    try:
        with _interrupted_by(signal.SIGTERM):
            work()
    except UserError as error:
        return refuse(error)
    except DamagedArtifact as error:
        return refuse(f"{error}; begin again with another --out")
    except KeyboardInterrupt:
        print("stopped; the rows that are done are kept, and the same command goes on", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _interrupted_by(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def lock_out(out: Path, locked: Path) -> None:
    """Keep other processes out of `locked`, in `out`, from before the rows are read. Raises UserError."""
    try:
        lock_run(locked)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


def read_kept(path: Path, model: type[Model]) -> Model | None:
    """What an earlier command kept; None where nothing is. Raises UserError when it cannot be read."""
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def refuse_other_settings(
    directory: Path, what: str, known: dict[str, Any], wanted: dict[str, Any], unused: set[str]
) -> None:
    """Raises UserError when kept rows are of other settings, those that are `unused` by any of them left aside."""
    changed = sorted(name for name in wanted if known.get(name) != wanted[name] and name not in unused)
    if changed:
        raise UserError(f"{directory} holds {what} with other settings ({', '.join(changed)}); choose another --out")


@contextmanager
def show_bars(console: Console, total: int) -> Iterator[tuple[Callable[[str, int], None], "Progress"]]:
    """(begin a row: its title, rows before it; show a step's progress) under two bars; without a terminal, nothing."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with ProgressBars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        rows = bars.add_task("", total=total)
        present = bars.add_task("", total=None)

        def begin(title: str, before: int) -> None:
            bars.update(rows, description=title, completed=before)

        def show_step(label: str, done: int, total: int) -> None:
            if bars.tasks[present].description != label:
                bars.reset(present, description=label)
            bars.update(present, completed=done, total=total)

        yield begin, show_step


def print_line(console: Console, line: str) -> None:
    """Neither wrapped nor coloured."""
    console.print(Text(line), soft_wrap=True)


def as_csv(model: type[BaseModel], rows: Sequence[BaseModel], exclude: Sequence[str] = ()) -> str:
    """The rows, a column for each field that is not left out."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [name for name in model.model_fields if name not in exclude], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump(exclude=set(exclude)) for row in rows)
    return file.getvalue()


def save_figure(figure: "Figure", kind: str, path: Path | IO[bytes]) -> None:
    """Write a figure as png or svg, to a path or into an open file: the same rows give the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "billhook"}):
        figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
