"""Prune a model with agents: `python -m graph.run [--config FILE] [--name NAME] [--FIELD VALUE …]`.

Without arguments it prunes SmolLM2-135M by `configs/quickstart.yaml`. Ctrl-C stops at the next layer;
`--resume NAME` goes on from there, as it does after a crash.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

from rich.console import Console

from graph.checks import check_target
from graph.config import RunConfig, read_config
from graph.drive import drive
from graph.persistence import STATE_VARIABLE, state_url
from graph.runs.directory import Work, resume, start, start_replay
from graph.runs.listing import list_runs
from tools.base.console import print_line
from tools.base.errors import UserError
from tools.base.options import CONFIGS, Parser, add_flags, parse_flags, refuse
from tools.base.rundir import RUNS_DIR_VARIABLE, runs_directory
from tools.base.secrets import read_secrets
from tools.base.words import count
from tools.models.hub import check_push
from tools.texts.windows import check_texts

SERVE_PORT = 8765


def make_parser() -> argparse.ArgumentParser:
    """One flag per field of `RunConfig`, with its sentence, beside the few that are about the command itself."""
    parser = Parser(prog="python -m graph.run", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; configs/quickstart.yaml when left out.")
    parser.add_argument("--name", help="Name of the run's directory; the config's name when left out.")
    parser.add_argument("--runs-dir", metavar="DIR", help=f"Where runs are kept; ${RUNS_DIR_VARIABLE} or runs/.")
    parser.add_argument("--resume", metavar="NAME", help="Go on with a run that was stopped or killed.")
    parser.add_argument(
        "--replay",
        metavar="RUN",
        help="Repeat a recorded run under a new name, with its config and plans: no agent is asked.",
    )
    parser.add_argument(
        "--state",
        metavar="URL",
        help=f"Where checkpoints and memory are kept: postgresql://USER@HOST/DATABASE; ${STATE_VARIABLE}, or a SQLite "
        "file in the runs directory. A password is better kept in the variable, or in ~/.pgpass.",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="ORGANISATION/NAME",
        help="Upload the pruned model and its card to the hub when the run is finished; with --resume also that of a "
        "run that is finished already. Needs HF_TOKEN or a login. A new repository is made private.",
    )
    parser.add_argument(
        "--serve",
        nargs="?",
        type=_port,
        const=SERVE_PORT,
        metavar="PORT",
        help="Show the report live in a browser on this machine while the run goes on, at "
        f"http://127.0.0.1:PORT/ ({SERVE_PORT} when left out, 0 for any that is free).",
    )
    parser.add_argument("--list", action="store_true", help="Show past runs as a table.")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Show the memory, disk and time that a run would need. Only the model's config is read: --model may be a "
        "config.json alone.",
    )
    parser.add_argument(
        "--device-memory",
        metavar="GB",
        help="With --dry-run: the memory of one device, such as 80, or of several, such as 8x80, of the machine that "
        "is planned for; those of this machine when left out.",
    )
    add_flags(parser, RunConfig)
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 stopped but resumable, 2 bad input."""
    try:
        read_secrets()
        options, flags = parse_flags(make_parser(), RunConfig, sys.argv[1:] if arguments is None else arguments)
        if options.runs_dir:
            os.environ[RUNS_DIR_VARIABLE] = options.runs_dir
        if options.state:
            os.environ[STATE_VARIABLE] = options.state
        state_url()
        if options.list:
            Console().print(list_runs(runs_directory()))
            return 0
        if options.dry_run:
            return _show_needs(options, flags)
        if options.device_memory is not None:
            raise UserError("--device-memory is about --dry-run; a run takes what there is")
        if options.push_to_hub is not None:
            check_push(options.push_to_hub)
        with _listen(options.serve) as listener:
            return drive(replace(_begin(options, flags), push=options.push_to_hub or "", listener=listener))
    except UserError as error:
        return refuse(error)


def _begin(options: argparse.Namespace, flags: dict[str, Any]) -> Work:
    """The run that the options are about, new or gone on with, its directory locked. Raises UserError."""
    runs_dir, path = runs_directory(), _given_path(options)
    if options.resume is not None:
        if options.name:
            raise UserError("--resume takes the run's name itself; leave --name out")
        if options.replay is not None:
            raise UserError("--resume goes on with a replay as well; leave --replay out")
        return resume(runs_dir, options.resume, flags, path)
    if options.replay is not None:
        if options.config:
            raise UserError("--replay takes the config of the run itself; leave --config out")
        if "approve" in flags:
            raise UserError("--replay repeats what a person said to the plans; leave --approve out")
        return start_replay(runs_dir, options.replay, options.name, flags)
    return start(runs_dir, options.name, flags, path or CONFIGS / "quickstart.yaml")


def _given_path(options: argparse.Namespace) -> Path | None:
    return None if options.config is None else Path(options.config)


def _show_needs(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    """Print what a run would need; it may be for another machine, or for a planner whose key is not here."""
    from graph.goals.schema import count_allowed, count_new_text
    from graph.planning.foresee import foresee_course  # imports torch, as the others do
    from graph.planning.orders import refuse_impossible_target
    from tools.estimate.memory import read_devices
    from tools.estimate.needs import estimate

    if options.resume is not None:
        raise UserError("--dry-run is about a new run; leave --resume out")
    if options.replay is not None:
        raise UserError("--dry-run is about a new run; leave --replay out, or give --config runs/NAME/config.yaml")
    config = read_config(flags, _given_path(options) or CONFIGS / "quickstart.yaml")
    devices = None if options.device_memory is None else read_devices(options.device_memory)
    check_target(config)
    check_texts(config)
    lines = estimate(
        *(config, foresee_course(config)),
        target=config.target_sparsity,
        devices=devices,
        directory=runs_directory(),
        refuse=partial(refuse_impossible_target, config=config),
    )
    uncounted = [", ".join(config.tasks)] if config.tasks else []
    if most := count_allowed(config):
        uncounted.append(f"up to {count(most, 'text')} of {count_new_text(config):,} tokens that a planner may ask for")
    console = Console()
    for line in [*lines, *([f"not counted: {'; '.join(uncounted)}"] if uncounted else [])]:
        print_line(console, line)
    return 0


@contextmanager
def _listen(port: int | None) -> Iterator[socket | None]:
    """The socket of the live page; None where none is asked for. Raises UserError before any work starts."""
    if port is None:
        yield None
        return
    try:
        from graph.show.live import listen
    except ImportError as error:
        raise UserError(
            "the packages for --serve are not installed; install them with: pip install -e '.[serve]'"
        ) from error
    with closing(listen(port)) as listener:
        yield listener


if __name__ == "__main__":
    sys.exit(main())
