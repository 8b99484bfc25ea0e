"""Write a pruned model: plain, as a run does, or packed: `python -m tools.export RUN --packed DIR`

RUN is a run's directory, its name under runs/, or any model: a directory, a .gguf file, package:NAME or a hub id.
A packed model is smaller than the dense one and decodes faster; python -m tools.generate DIR runs it.
"""

import sys
from pathlib import Path
from typing import Literal

from rich.console import Console

from tools.base.console import carry_out, print_line
from tools.base.errors import UserError
from tools.base.options import Parser
from tools.base.settings import WorkbenchSettings
from tools.models.formats import DTYPES, Dtype
from tools.models.load import find_model, load_model, read_dtype
from tools.results.cards import write_packed_card


def export_packed(source: str, directory: Path, dtype: Dtype | Literal[""], console: Console) -> None:
    """Pack a model. Raises UserError."""
    from tools.models.packed import describe_packed, is_packed, save_packed

    place = find_model(source)
    if directory.exists():
        raise UserError(f"{directory} exists already; choose another --packed")
    if is_packed(place):
        raise UserError(f"{place} is packed already")
    model, tokenizer = load_model(WorkbenchSettings(model=place, dtype=dtype or read_dtype(place), device="cpu"))
    words = f"`{source}`" + (f", weights rounded to {dtype}" if dtype else "")
    contents = save_packed(
        model, tokenizer, directory, lambda contents: write_packed_card(words, describe_packed(contents))
    )
    print_line(console, describe_packed(contents))
    print_line(console, f"run it: python -m tools.generate {directory}")


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted, 2 bad input."""
    console = Console()

    def work() -> None:
        parser = Parser(prog="python -m tools.export", description=__doc__, allow_abbrev=False)
        parser.add_argument("run", metavar="RUN")
        parser.add_argument("--packed", metavar="DIR", required=True, help="Directory of the packed model.")
        parser.add_argument(
            "--dtype", choices=tuple(DTYPES), default="", help="Round the weights to this format; default: none."
        )
        options = parser.parse_args(arguments)
        export_packed(options.run, Path(options.packed), options.dtype, console)

    return carry_out(work)


if __name__ == "__main__":
    sys.exit(main())
