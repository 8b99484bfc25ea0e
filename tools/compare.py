"""Which recipe is best on this model? `python -m tools.compare --recipes wanda:uniform,refit:kappa --sparsity 0.45,2:4`

Prunes the model by every recipe (METHOD:ALLOCATION) to every sparsity, measures each on the validation text, and writes
compare.csv, compare.md, compare.json and a plot of perplexity over sparsity. Rows that are done are kept on Ctrl-C;
the same command goes on.

Rows are made one after another. With `--workers` the work of each is shared: layers to prune are dealt out, text is
shared out in windows and questions in batches, and the candidates of an evolutionary search are each measured whole by
one worker. Structured rows and tasks are this process' alone. The figures are the same.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from tools.base.console import carry_out
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.experiments.comparison import CompareSettings, compare, show_needs
from tools.results.paper import PRESETS


def make_parser() -> argparse.ArgumentParser:
    """One flag per field of `CompareSettings`, beside two about the command itself."""
    parser = Parser(prog="python -m tools.compare", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; a run's config will do.")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="Recipes, sparsities and tasks at once, where no flag says otherwise. paper: the baselines, the sparsity "
        "and the tasks of arXiv 2601.09694.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Show the memory, disk and time that the rows would need. Only the model's config is read: --model may be "
        "a config.json alone.",
    )
    add_flags(parser, CompareSettings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (the same command goes on), 2 bad input."""
    given = sys.argv[1:] if arguments is None else arguments
    return carry_out(lambda: _obey(given))


def _obey(arguments: list[str]) -> None:
    options, flags = parse_flags(make_parser(), CompareSettings, arguments)
    path = Path(options.config) if options.config else None
    preset = PRESETS[options.preset] if options.preset else {}
    settings = read_options(CompareSettings, {**preset, **flags}, path, ignore_unknown=True)
    if options.dry_run:
        show_needs(settings, Console())
    else:
        compare(settings, Console())


if __name__ == "__main__":
    sys.exit(main())
