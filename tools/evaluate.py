"""What does a model know? `python -m tools.evaluate MODEL [MODEL…] --tasks mmlu,freebaseqa --limit 50 --out DIR`

Asks each model the tasks of lm-evaluation-harness, and writes evaluate.json, .csv and .md: figures with standard
errors, and how far every further model is from the first. MODEL is a hub id, a directory (such as a run's model/), a
.gguf file or package:NAME. Figures that are done are kept on Ctrl-C; the same command goes on.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from tools.base.console import carry_out, print_line
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.experiments.evaluation import EvaluateSettings, evaluate
from tools.results.evaluation import describe_line, list_lines, make_table


def make_parser() -> argparse.ArgumentParser:
    """The models, and one flag per field of `EvaluateSettings`."""
    parser = Parser(prog="python -m tools.evaluate", description=__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="A model, named as for a run, or a run: its model.")
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; a run's config will do.")
    add_flags(parser, EvaluateSettings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (the same command goes on), 2 bad input."""
    given = sys.argv[1:] if arguments is None else arguments
    return carry_out(lambda: _obey(given))


def _obey(arguments: list[str]) -> None:
    options, flags = parse_flags(make_parser(), EvaluateSettings, arguments)
    path = Path(options.config) if options.config else None
    settings, console = read_options(EvaluateSettings, flags, path, ignore_unknown=True), Console()
    known = evaluate(options.models, settings, console)
    for line in list_lines(known):
        print_line(console, describe_line(line))
    if console.is_terminal:
        console.print(make_table(known))
    print_line(console, f"see {Path(settings.out) / 'evaluate.md'}")


if __name__ == "__main__":
    sys.exit(main())
