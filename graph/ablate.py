"""Was the agent worth its tokens? `python -m graph.ablate --planner openai:gpt-5.1 --out ablate`

Prunes the same model to the same sparsity in several ways (arms), each with the same budget of tokens put through
the model, once for every seed, and measures what each arm kept on the test text. Writes ablate.csv, ablate.md,
ablate.json and a plot. Finished rows are kept on Ctrl-C, and half-done runs go on; the same command does it.
"""

import sys
from pathlib import Path

from rich.console import Console

from graph.ablation.experiment import ablate
from graph.ablation.settings import AblateSettings
from tools.base.console import carry_out
from tools.base.options import Parser, add_flags, parse_flags, read_options


def make_parser() -> Parser:
    """One flag per field of `AblateSettings`, beside one about the command itself."""
    parser = Parser(
        prog="python -m graph.ablate",
        description=__doc__,
        epilog="Options of graph.run behind a lone -- are handed on to the arms that are runs of the graph.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; a run's config will do.")
    add_flags(parser, AblateSettings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (the same command goes on), 2 bad input.

    Whatever stands behind `--` is handed on to the runs of the graph, such as prices and time-outs.
    """
    given = sys.argv[1:] if arguments is None else arguments
    own, graph_flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    return carry_out(lambda: _obey(own, graph_flags))


def _obey(arguments: list[str], graph_flags: list[str]) -> None:
    options, flags = parse_flags(make_parser(), AblateSettings, arguments)
    path = Path(options.config) if options.config else None
    ablate(read_options(AblateSettings, flags, path, ignore_unknown=True), graph_flags, Console())


if __name__ == "__main__":
    sys.exit(main())
