"""Prune a model with agents: `python -m graph.run [--config FILE] [--name NAME] [--FIELD VALUE …]`.

Without arguments it prunes SmolLM2-135M by `configs/quickstart.yaml`. Ctrl-C stops after the present step;
`--resume NAME` goes on from there, as it does after a crash.
"""

import argparse
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphDrained
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import RunControl
from rich.console import Console

from graph.agents.chat import AgentError, check_planner
from graph.config import RunConfig, read_config
from graph.display import Display, open_display
from graph.persistence import RUNS_DIR_VARIABLE, database, open_saver, open_store, runs_directory
from graph.runs import list_runs
from graph.session import create_run, read_run
from graph.state import Input, State
from tools.errors import DamagedArtifact, DiskFull, UserError
from tools.files import explain_full_disk
from tools.options import CONFIGS, Parser, add_flags, parse_flags
from tools.rundir import append_event, lock_run, unlock_run
from tools.secrets import read_secrets, redact
from tools.sources import check_device, locate_model
from tools.texts import check_source

STEPS_PER_ITERATION = 5
TESTED_MODELS = 3
"""The dense, the pruned and the uniform Wanda model are measured on the test text."""


def make_parser() -> argparse.ArgumentParser:
    """One flag per field of `RunConfig`, with its sentence, beside the few that are about the command itself."""
    parser = Parser(
        prog="python -m graph.run",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; configs/quickstart.yaml when left out.")
    parser.add_argument("--name", help="Name of the run's directory; the config's name when left out.")
    parser.add_argument("--runs-dir", metavar="DIR", help=f"Where runs are kept; ${RUNS_DIR_VARIABLE} or runs/.")
    parser.add_argument("--resume", metavar="NAME", help="Go on with a run that was stopped or killed.")
    parser.add_argument("--list", action="store_true", help="Show past runs as a table.")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Show the memory, disk and time that a run would need. Only the model's config is read: --model may be a "
        "config.json alone.",
    )
    add_flags(parser, RunConfig)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 stopped but resumable, 2 bad input."""
    read_secrets()
    try:
        options, flags = parse_flags(make_parser(), RunConfig, sys.argv[1:] if arguments is None else arguments)
        if options.runs_dir:
            os.environ[RUNS_DIR_VARIABLE] = options.runs_dir
        if options.list:
            Console().print(list_runs(runs_directory()))
            return 0
        if options.dry_run:
            return _show_needs(options, flags)
        return _start(options, flags) if options.resume is None else _resume(options, flags)
    except UserError as error:
        print(f"error: {redact(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def _start(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    path = _given_path(options) or CONFIGS / "quickstart.yaml"
    config = read_config(flags, path)
    _check_input(config)
    runs_dir = runs_directory()
    name = _free_name(runs_dir, path.stem) if options.name is None else options.name
    thread = str(uuid.uuid4())
    create_run(runs_dir, name, config, thread)
    return _drive(runs_dir, name, config, thread, resumed=False)


def _check_input(config: RunConfig) -> None:
    """Refuse what can be refused before anything is loaded. Raises UserError."""
    locate_model(config.model)
    check_device(config.device)
    _check_texts(config)
    check_planner(config.planner)


def _check_texts(config: RunConfig) -> None:
    for source in (config.calibration, config.validation, config.test):
        check_source(source)


def _show_needs(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    """Print what a run would need; it may be one for another machine, or for a planner whose key is not here."""
    from tools.estimate import estimate, print_estimate  # imports torch

    if options.resume is not None:
        raise UserError("--dry-run is about a new run; leave --resume out")
    config = read_config(flags, _given_path(options) or CONFIGS / "quickstart.yaml")
    _check_texts(config)
    found = estimate(
        config,
        target=config.target_sparsity,
        rounds=config.max_iterations,
        profiles=config.max_iterations if config.reprofile else 1,
        tests=TESTED_MODELS,
    )
    print_estimate(found, Console())
    return 0


def _free_name(runs_dir: Path, stem: str) -> str:
    """The config's name, with a number when a run has it already."""
    names = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(name for name in names if not (runs_dir / name).exists())


def _resume(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    runs_dir, name = runs_directory(), options.resume
    if options.name:
        raise UserError("--resume takes the run's name itself; leave --name out")
    thread, config = read_run(runs_dir, name)
    wanted = read_config(flags if options.config else {**config.model_dump(), **flags}, _given_path(options))
    changed = [field for field in RunConfig.model_fields if getattr(wanted, field) != getattr(config, field)]
    if changed:
        raise UserError(f"run {name!r} cannot be resumed with a changed config ({', '.join(changed)}); start a new run")
    check_planner(config.planner)
    lock_run(runs_dir / name)
    return _drive(runs_dir, name, config, thread, resumed=True)


def _given_path(options: argparse.Namespace) -> Path | None:
    return None if options.config is None else Path(options.config)


def _drive(runs_dir: Path, name: str, config: RunConfig, thread: str, *, resumed: bool) -> int:
    """Run the graph until it ends, is drained, or fails; the run's directory is free again afterwards."""
    from graph.build import builder
    from tools.workbench import close_workbench

    settings: RunnableConfig = {
        "configurable": {"thread_id": thread},
        "recursion_limit": STEPS_PER_ITERATION * config.max_iterations + 10,
    }
    try:
        with open_saver(runs_dir) as saver, open_store(runs_dir) as store:
            app = builder().compile(checkpointer=saver, store=store, name="billhook")
            snapshot = app.get_state(settings)
            if snapshot.values and not snapshot.tasks:  # `next` leaves out a node that ended just before a kill
                print(f"run {name} is finished: see {runs_dir / name / 'report.md'}")
                return 0
            state = State.model_validate(snapshot.values) if snapshot.values else None
            _refuse_changed_config(name, config, state)
            try:
                with explain_full_disk(database(runs_dir)):
                    return _stream(app, settings, runs_dir / name, config, state, resumed)
            except DiskFull:
                raise
            except UserError:
                profiled = app.get_state(settings).values.get("profile")
                if not resumed and not profiled:  # nothing was done yet: leave nothing behind
                    saver.delete_thread(thread)
                    shutil.rmtree(runs_dir / name)
                raise
    finally:
        close_workbench()
        unlock_run(runs_dir / name)


def _stream(
    app: CompiledStateGraph[State, RunConfig, Input, State],
    settings: RunnableConfig,
    directory: Path,
    config: RunConfig,
    state: State | None,
    resumed: bool,
) -> int:
    """Stream the graph into the display. Raises UserError."""
    name, control = directory.name, RunControl()
    with ExitStack() as shown:
        display = shown.enter_context(open_display(Console(), name=name, target=config.target_sparsity))

        def stop_at_once() -> None:
            # Python would wait for the node's thread, which cannot be stopped. What it writes is written aside, and
            # its lock is the operating system's.
            _stop(display, directory, "interrupted")
            shown.close()
            sys.stdout.flush()
            os._exit(1)

        _tell_start(display, directory, config, state, resumed)
        try:
            with _drain_on_signal(control, display, stop_at_once):
                for part in app.stream(
                    None if state else Input(run=name),
                    settings,
                    context=config,
                    stream_mode="custom",
                    durability="sync",
                    control=control,
                ):
                    display.show(part)
        except GraphDrained:
            return _stop(display, directory, "stopped as asked, after the present step")
        except (AgentError, DamagedArtifact) as error:
            return _stop(display, directory, str(error))
    return 0


def _refuse_changed_config(name: str, config: RunConfig, state: State | None) -> None:
    """`config.yaml` must say what the run was started with."""
    if state is None or not state.profile:
        return
    changed = [f for f in RunConfig.model_fields if getattr(state.config, f) != getattr(config, f)]
    if changed:
        raise UserError(
            f"run {name!r} cannot be resumed with a changed config ({', '.join(changed)}): its config.yaml was edited"
        )


def _tell_start(display: Display, directory: Path, config: RunConfig, state: State | None, resumed: bool) -> None:
    event = {
        "type": "start",
        "run": directory.name,
        "directory": str(directory),
        "model": config.model,
        "target": config.target_sparsity,
        "planner": config.planner,
        "resumed": resumed,
    }
    append_event(directory, event)
    display.show(event)
    if state is not None:
        for trial in [*([state.dense] if state.dense else []), *state.trials]:
            display.show({"type": "trial", **trial.model_dump()})


def _stop(display: Display, directory: Path, reason: str) -> int:
    option = f" --runs-dir {directory.parent}" if str(directory.parent) != "runs" else ""
    event = {
        "type": "stopped",
        "reason": redact(reason),
        "resume": f"python -m graph.run --resume {directory.name}{option}",
    }
    append_event(directory, event)
    display.show(event)
    return 1


@contextmanager
def _drain_on_signal(control: RunControl, display: Display, stop_at_once: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after the present step, a second one at once."""

    def ask(_number: int, _frame: Any) -> None:
        if control.drain_requested:
            stop_at_once()
        control.request_drain("signal")
        display.show({"type": "note", "text": "stopping after the present step; once more stops at once"})

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
