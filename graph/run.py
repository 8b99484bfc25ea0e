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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphDrained
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import RunControl
from langgraph.types import Command, StateSnapshot
from rich.console import Console

from graph.config import RunConfig, read_config
from graph.llm.ladder import AgentError
from graph.llm.local import close_local
from graph.llm.models import check_model
from graph.persistence import (
    STATE_VARIABLE,
    StateLost,
    explain_lost_state,
    open_saver,
    open_store,
    state_url,
)
from graph.persistence.sqlite import database
from graph.runs.forks import CHANGEABLE, name_directory, read_last_node
from graph.runs.listing import list_runs
from graph.runs.replay import read_record
from graph.runs.session import check_input, create_run, read_replay, read_run, write_config
from graph.show.display import Display, open_display, tell
from graph.state import Input, State
from tools.base.errors import DamagedArtifact, DiskFull, UserError
from tools.base.files import explain_full_disk
from tools.base.options import CONFIGS, Parser, add_flags, parse_flags, refuse
from tools.base.rundir import RUNS_DIR_VARIABLE, append_event, lock_run, runs_directory, unlock_run
from tools.base.secrets import read_secrets, redact
from tools.models.hub import NotPushed, check_push, push_model
from tools.texts.windows import check_texts
from tools.workbench.open import close_workbench

STEPS_PER_ITERATION = 7
"""profile again, plan, approve, prune, validate, accept or roll back, reflect."""
SERVE_PORT = 8765
TESTED_MODELS = 3
"""The dense, the pruned and the uniform Wanda model are measured on the test text."""

App = CompiledStateGraph[State, RunConfig, Input, State]


@dataclass(frozen=True)
class Work:
    """A run to be worked on."""

    directory: Path
    config: RunConfig
    thread: str
    replay: str = ""
    """The run that it repeats."""
    resumed: bool = False
    push: str = ""
    """The repository of the hub that the model goes to."""
    listener: socket | None = None
    """Where the live page is served."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.name

    @property
    def settings(self) -> RunnableConfig:
        """What LangGraph finds the run by."""
        limit = STEPS_PER_ITERATION * self.config.max_iterations + 10
        return {"configurable": {"thread_id": self.thread}, "recursion_limit": limit}

    @property
    def resume_command(self) -> str:
        """What goes on with the run, and pushes it."""
        runs_dir = self.directory.parent
        place = f" --runs-dir {runs_dir}" if str(runs_dir) != "runs" else ""
        return f"python -m graph.run --resume {self.name}{place}{f' --push-to-hub {self.push}' if self.push else ''}"


class Unanswered(RuntimeError):
    """A plan waits for a person, and nobody is there."""


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
    read_secrets()
    try:
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
            work = _start(options, flags) if options.resume is None else _resume(options, flags)
            return _drive(replace(work, push=options.push_to_hub or "", listener=listener))
    except UserError as error:
        return refuse(error)


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


def _start(options: argparse.Namespace, flags: dict[str, Any]) -> Work:
    """A new run, its directory made and locked."""
    runs_dir, replay = runs_directory(), options.replay or ""
    if replay:
        stem, config = f"{replay}-replay", _read_replayed(runs_dir, replay, options, flags)
    else:
        path = _given_path(options) or CONFIGS / "quickstart.yaml"
        stem, config = path.stem, read_config(flags, path)
        check_model(config.planner)
        check_model(config.reflector)
    check_input(config)
    name = _free_name(runs_dir, stem) if options.name is None else options.name
    thread = str(uuid.uuid4())
    create_run(runs_dir, name, config, thread, replay)
    return Work(runs_dir / name, config, thread, replay)


def _read_replayed(runs_dir: Path, replay: str, options: argparse.Namespace, flags: dict[str, Any]) -> RunConfig:
    """The config of a run that is to be replayed, whose record is whole. Raises UserError."""
    if options.config:
        raise UserError("--replay takes the config of the run itself; leave --config out")
    if "approve" in flags:
        raise UserError("--replay repeats what a person said to the plans; leave --approve out")
    _, config = read_run(runs_dir, replay)
    if not read_record(replay).plans:
        raise UserError(f"the record of run {replay!r} holds no plan to repeat")
    return read_config({**config.model_dump(), **flags}, None)


def _show_needs(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    """Print what a run would need; it may be one for another machine, or for a planner whose key is not here."""
    from tools.estimate.needs import estimate, print_estimate, read_devices  # imports torch

    if options.resume is not None:
        raise UserError("--dry-run is about a new run; leave --resume out")
    config = read_config(flags, _given_path(options) or CONFIGS / "quickstart.yaml")
    check_texts(config)
    found = estimate(
        config,
        target=config.target_sparsity,
        rounds=config.max_iterations,
        profiles=config.max_iterations if config.reprofile else 1,
        tests=TESTED_MODELS,
        devices=None if options.device_memory is None else read_devices(options.device_memory),
    )
    print_estimate(found, Console())
    return 0


def _free_name(runs_dir: Path, stem: str) -> str:
    """The config's name, with a number when a run has it already."""
    names = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(name for name in names if not (runs_dir / name).exists())


def _resume(options: argparse.Namespace, flags: dict[str, Any]) -> Work:
    """A run that was begun, its directory locked."""
    runs_dir, name = runs_directory(), options.resume
    if options.name:
        raise UserError("--resume takes the run's name itself; leave --name out")
    if options.replay:
        raise UserError("--resume goes on with a replay as well; leave --replay out")
    thread, config = read_run(runs_dir, name)
    replay = read_replay(runs_dir / name)
    wanted = read_config(flags if options.config else {**config.model_dump(), **flags}, _given_path(options))
    changed = [field for field in RunConfig.model_fields if getattr(wanted, field) != getattr(config, field)]
    if refused := [field for field in changed if field not in CHANGEABLE]:
        raise UserError(f"run {name!r} cannot be resumed with a changed config ({', '.join(refused)}); start a new run")
    if not replay and not (runs_dir / name / "summary.json").is_file():  # else no agent is asked any more
        check_model(config.planner)
        check_model(config.reflector)
    lock_run(runs_dir / name)
    if changed:
        write_config(runs_dir / name, wanted)
    return Work(runs_dir / name, wanted, thread, replay, resumed=True)


def _given_path(options: argparse.Namespace) -> Path | None:
    return None if options.config is None else Path(options.config)


def _drive(work: Work) -> int:
    """Work on a run, and push its model where that is asked for; the directory is free afterwards."""
    try:
        try:
            code = _run_graph(work)
        finally:
            close_local()
            close_workbench()
        return _push(work) if work.push and code == 0 else code
    finally:
        unlock_run(work.directory)


def _run_graph(work: Work) -> int:
    """Run the graph until it ends, waits for a person, is drained, or fails."""
    from graph.build import builder

    runs_dir = work.directory.parent
    with open_saver(runs_dir) as saver, open_store(runs_dir) as store:
        app = builder().compile(checkpointer=saver, store=store, name="billhook")
        snapshot, settings = _find_snapshot(app, work)
        if snapshot.values and not snapshot.tasks:  # `next` leaves out a node that ended just before a kill
            print(f"run {work.name} is finished: see {work.directory / 'report.html'}")
            return 0
        state = State.model_validate(snapshot.values) if snapshot.values else None
        _refuse_lost_state(work, state)
        _refuse_changed_config(work, state)
        try:
            with explain_full_disk(database(runs_dir)):
                return _stream(app, work, settings, state)
        except DiskFull:
            raise
        except UserError:
            profiled = app.get_state(work.settings).values.get("profile")
            if not work.resumed and not profiled:  # nothing was done yet: leave nothing behind
                saver.delete_thread(work.thread)
                shutil.rmtree(work.directory)
            raise


def _push(work: Work) -> int:
    """Upload the model of a finished run; nothing of the run is lost where that fails."""
    try:
        url = push_model(work.directory / "model", work.push)
    except NotPushed as error:
        later = f"the run is whole; push it later with: {work.resume_command}"
        print(f"not pushed to {work.push}: {str(error).rstrip('.')}; {later}", file=sys.stderr)
        return 1
    event = {"type": "pushed", "repository": work.push, "url": url}
    append_event(work.directory, event)
    print(tell(event))
    return 0


def _find_snapshot(app: App, work: Work) -> tuple[StateSnapshot, RunnableConfig]:
    """Where the run stands, and the settings to go on from there.

    In Studio a fork may have gone on in the run's thread; then the run's own last checkpoint has to be named.
    """
    last = app.get_state(work.settings)
    if _belongs(last, work):
        return last, work.settings
    for snapshot in app.get_state_history(work.settings):
        if _belongs(snapshot, work):
            named = {**work.settings["configurable"], **snapshot.config["configurable"]}
            return snapshot, {**work.settings, "configurable": named}
    raise UserError(f"the checkpoints of run {work.name!r} are gone; its thread holds those of {last.values['run']!r}")


def _belongs(snapshot: StateSnapshot, work: Work) -> bool:
    """Whether what follows a checkpoint works in the run's directory."""
    if not snapshot.values.get("profile"):
        return bool(snapshot.values.get("run", work.name) == work.name)
    node = snapshot.tasks[0].name if snapshot.tasks else ""
    checkpoint = snapshot.config["configurable"]["checkpoint_id"]
    return name_directory(State.model_validate(snapshot.values), node, checkpoint, work.thread) == work.name


def _stream(app: App, work: Work, settings: RunnableConfig, state: State | None) -> int:
    """Stream the graph into the display, with a person's answers where it asks. Raises UserError."""
    control = RunControl()
    with ExitStack() as shown:
        if work.listener:
            from graph.show.live import address, serve

            print(f"live page: {address(work.listener)}", flush=True)
        display = shown.enter_context(open_display(Console(), name=work.name, target=work.config.target_sparsity))
        if work.listener:
            display = shown.enter_context(serve(work.directory, work.listener, display))

        def stop_at_once() -> None:
            # Python would wait for the node's thread, which cannot be stopped. What it writes is written aside, and
            # its lock is the operating system's.
            _stop(display, work, "interrupted")
            shown.close()
            sys.stdout.flush()
            os._exit(1)

        _tell_start(display, work, state)
        given: Input | Command[Any] | None = None if state else Input(run=work.name, replay=work.replay)
        try:
            with explain_lost_state():
                while True:
                    with _drain_on_signal(control, display, stop_at_once):
                        for part in app.stream(
                            given,
                            settings,
                            context=work.config,
                            stream_mode="custom",
                            durability="sync",
                            control=control,
                        ):
                            display.show(part)
                    asked = app.get_state(work.settings).interrupts
                    if not asked:
                        return 0
                    given, settings = Command(resume=_ask(display, asked[0].value)), work.settings
        except GraphDrained:
            return _stop(display, work, "stopped as asked, after the present step")
        except (AgentError, DamagedArtifact, StateLost, Unanswered) as error:
            return _stop(display, work, str(error))


def _ask(display: Display, question: dict[str, Any]) -> str:
    """A line that a person says to a plan. Raises Unanswered."""
    waiting = f"plan {question['iteration']} waits for a person to accept, edit or refuse it"
    if sys.stdin is None or not sys.stdin.isatty():
        raise Unanswered(f"{waiting}: resume in a terminal, or answer in Studio")
    try:
        return display.ask(question)
    except (EOFError, KeyboardInterrupt):
        raise Unanswered(waiting) from None


def _refuse_lost_state(work: Work, state: State | None) -> None:
    """A run that was at work has left a checkpoint, before its first node began."""
    if state is None and read_last_node(work.directory):
        raise UserError(f"the checkpoints of run {work.name!r} are not in this database; name the one it began with")


def _refuse_changed_config(work: Work, state: State | None) -> None:
    """`config.yaml` must say what the run was started with, but for what may change."""
    if state is None or not state.profile:
        return
    fields = [field for field in RunConfig.model_fields if field not in CHANGEABLE]
    if changed := [field for field in fields if getattr(state.config, field) != getattr(work.config, field)]:
        raise UserError(
            f"run {work.name!r} cannot be resumed with a changed config ({', '.join(changed)}): its config.yaml was "
            "edited"
        )


def _tell_start(display: Display, work: Work, state: State | None) -> None:
    event = {
        "type": "start",
        "run": work.name,
        "directory": str(work.directory),
        "model": work.config.model,
        "target": work.config.target_sparsity,
        "planner": f"the record of {work.replay}" if work.replay else work.config.planner,
        "resumed": work.resumed,
    }
    append_event(work.directory, event)
    display.show(event)
    if state is not None:
        for trial in [*([state.dense] if state.dense else []), *state.trials]:
            display.show({"type": "trial", **trial.model_dump()})


def _stop(display: Display, work: Work, reason: str) -> int:
    event = {"type": "stopped", "reason": redact(reason), "resume": work.resume_command}
    append_event(work.directory, event)
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
