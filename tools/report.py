"""A run on one page that anyone can open: `python -m tools.report RUN [RUN …] [--out FILE]`

RUN is a run's directory or its name under runs/. One run's page is written beside its figures, as report.html; several
stand side by side in --out. A run that is not finished has a page too.
"""

import sys
from pathlib import Path

from tools.base.console import UNWRITTEN, carry_out
from tools.base.errors import UserError
from tools.base.files import explain_unwritable, write_text
from tools.base.options import Parser
from tools.base.rundir import list_places, runs_directory
from tools.results.page.page import write_page


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted, 2 bad input."""
    given = sys.argv[1:] if arguments is None else arguments
    return carry_out(lambda: _obey(given), UNWRITTEN)


def _obey(arguments: list[str]) -> None:
    parser = Parser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="A run's directory, or its name under runs/.")
    parser.add_argument("--out", metavar="FILE", type=Path, help="The page; of one run, its directory's report.html.")
    options = parser.parse_args(arguments)
    runs = [find_run(name) for name in options.runs]
    if len(runs) > 1 and options.out is None:
        raise UserError("several runs need --out FILE for their page")
    path = options.out or runs[0] / "report.html"
    page = write_page(runs)
    with explain_unwritable(path):
        write_text(path, page)
    print(path)


def find_run(name: str) -> Path:
    """The directory of a run, by itself or by its name. Raises UserError where there is none."""
    found = [path for path in list_places(name) if path.is_dir()]
    if found:  # a model's directory may be called as a run is
        return next((path for path in found if (path / "events.jsonl").is_file()), found[0])
    raise UserError(f"there is no run {name!r}, neither as a directory nor in {runs_directory()}")


if __name__ == "__main__":
    sys.exit(main())
