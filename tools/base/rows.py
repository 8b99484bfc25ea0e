"""What a command keeps of the rows that it makes one by one, so that it goes on where it stopped. No torch in here."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from tools.base.errors import DamagedFile, UserError
from tools.base.files import explain_unwritable, read_json, write_json
from tools.base.rundir import lock_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Model = TypeVar("Model", bound=BaseModel)


def lock_out(out: Path, locked: Path) -> None:
    """Keep other processes out of `locked`, in `out`, from before the rows are read. Raises UserError."""
    with explain_unwritable(f"--out {out}"):
        lock_run(locked)


def write_kept(path: Path, rows: BaseModel) -> None:
    """Keep what a command made so far."""
    write_json(path, rows.model_dump(mode="json"))


def read_kept(path: Path, model: type[Model]) -> Model | None:
    """What an earlier command kept; None where nothing is. Raises UserError when it is not to be read, or damaged."""
    if not path.is_file():
        return None
    try:
        return model.model_validate(read_json(path, "put it back as it was, or choose another --out"))
    except DamagedFile:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not of this version of Billhook; choose another --out") from error


def read_search(path: Path, model: type[Model], warn: Callable[[str], None]) -> Model | None:
    """What was kept of a search; None where nothing is, or, with a warning, where it is damaged."""
    if not path.is_file():
        return None
    try:
        return model.model_validate(read_json(path, "the search begins anew"))
    except ValueError:
        warn(f"{path} is damaged; the search begins anew")
        return None


def refuse_other_settings(
    directory: Path, what: str, known: dict[str, Any], wanted: dict[str, Any], unused: set[str]
) -> None:
    """Raises UserError when kept rows are of other settings, those that are `unused` by any of them left aside.

    What they were made by and nobody wants now may be missing in `wanted`, as named texts are where there are none.
    """
    now = {name: None for name, value in known.items() if value} | wanted
    changed = sorted(name for name in now if known.get(name) != now[name] and name not in unused)
    if changed:
        raise UserError(f"{directory} holds {what} with other settings ({', '.join(changed)}); choose another --out")


def as_csv(
    model: type[Model],
    rows: Sequence[Model],
    exclude: Sequence[str] = (),
    more: Callable[[Model], dict[str, Any]] = lambda row: {},
) -> str:
    """The rows, a column for each field that is not left out, and behind them what there is `more` of any row."""
    file, further = io.StringIO(), [more(row) for row in rows]
    names = [name for name in model.model_fields if name not in exclude]
    columns = dict.fromkeys([*names, *(name for found in further for name in found)])
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump(exclude=set(exclude)) | found for row, found in zip(rows, further, strict=True))
    return file.getvalue()


def save_figure(figure: "Figure", kind: str, path: Path | IO[bytes]) -> None:
    """Write a figure as png or svg, to a path or into an open file: the same rows give the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "billhook"}):
        figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
