"""Hurt runs many times and see that nothing is lost: `python -m tests.campaign kill --times 100`.

    python -m tests.campaign kill [--times 100] [--seed 0] [--workers 20]
    python -m tests.campaign damage [--times 1000] [--seed 0]

`kill` ends runs of a tiny model by SIGKILL at random moments of every node, resumes them, and compares what they come
to with the run that was left alone. `damage` edits files of runs at random, and runs a command on each: it must show
the same, or say in a line what is wrong. Exits with 1 when one came out otherwise; its directory is kept and named.
"""

import argparse
import sys

from tests.campaign import damage, kill


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    campaigns = parser.add_subparsers(dest="campaign", required=True)
    kill.add_arguments(campaigns.add_parser("kill", help="SIGKILL and resume"))
    damage.add_arguments(campaigns.add_parser("damage", help="files under runs/ edited at random"))
    options = parser.parse_args(arguments)
    return int(options.work(options))


if __name__ == "__main__":
    sys.exit(main())
