"""Make a model smaller and faster for good: `python -m tools.structure --remove 0.2 --parts neurons,heads --out cut`

Takes whole neurons and groups of attention heads, or whole blocks, out of the model, refits what remains by least
squares, and writes a smaller model (OUT/model) that stock transformers loads, with its figures (OUT/structure.json).
"""

import sys
from pathlib import Path

from rich.console import Console

from tools.base.console import UNWRITTEN, carry_out, show_bar
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.experiments.structure import StructureSettings, cut_model
from tools.results.structure import make_table, name_target


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted, 2 bad input."""
    parser = Parser(prog="python -m tools.structure", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; a run's config will do.")
    add_flags(parser, StructureSettings)
    given = sys.argv[1:] if arguments is None else arguments

    def work() -> None:
        console = Console()
        options, flags = parse_flags(parser, StructureSettings, given)
        path = Path(options.config) if options.config else None
        settings = read_options(StructureSettings, flags, path, ignore_unknown=True)
        with show_bar(console) as step:
            result = cut_model(settings, step)
        went = f"{name_target(result)}; {result.constraint}"
        console.print(make_table(result))
        console.print(went, markup=False)
        console.print(f"model and figures: {settings.out}", markup=False, soft_wrap=True)

    return carry_out(work, UNWRITTEN)


if __name__ == "__main__":
    sys.exit(main())
