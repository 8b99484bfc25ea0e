"""Works on a run until it ends, waits for a person, is stopped, or fails: `python -m graph.run` behind its flags."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphDrained
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import RunControl
from langgraph.types import Command, StateSnapshot
from rich.console import Console

from graph.config import CHANGEABLE, RunConfig
from graph.goals.schema import follow_brief, follow_new_texts
from graph.llm.ladder import AgentError
from graph.llm.local import close_local
from graph.persistence import StateLost, explain_damaged_state, explain_lost_state, open_saver, open_store
from graph.persistence.sqlite import database
from graph.runs.directory import Work
from graph.runs.steps import name_directory, read_last_node
from graph.show.display import Display, open_display
from graph.show.words import tell
from graph.state import Input, State, UnreadableState
from tools.base.errors import BrokenBaseline, BrokenPlan, DamagedArtifact, DiskFull, UserError
from tools.base.files import explain_full_disk
from tools.base.progress import Stopped, stop_at
from tools.base.rundir import advise, append_event, check_model, unlock_run
from tools.base.secrets import redact
from tools.models.hub import NotPushed, push_model
from tools.workbench.open import close_workbench

App = CompiledStateGraph[State, RunConfig, Input, State]


class Unanswered(RuntimeError):
    """A plan waits for a person, and nobody is there."""


def drive(work: Work) -> int:
    """Work on a run, and push its model where that is asked for; the directory is free afterwards."""
    try:
        try:
            code = _run_graph(work)
        except UnreadableState as error:
            raise UserError(f"run {work.name!r} cannot go on: {error}") from error
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
    with explain_damaged_state(runs_dir), open_saver(runs_dir) as saver, open_store(runs_dir) as store:
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
    check_model(work.directory)
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
        if snapshot.values.get("run") and _belongs(snapshot, work):  # those that name no run yet are anybody's
            named = {**work.settings["configurable"], **snapshot.config["configurable"]}
            return snapshot, {**work.settings, "configurable": named}
    if (owner := last.values["run"]) == work.name:
        raise UserError(
            f"run {work.name!r} cannot go on: its events.jsonl and its checkpoints are not of one time; "
            f"{advise(work.directory)}"
        )
    raise UserError(
        f"{work.directory} is a copy of run {owner!r}, or was once called so, and its checkpoints are that run's; call "
        f"the directory {owner!r} again to go on"
    )


def _belongs(snapshot: StateSnapshot, work: Work) -> bool:
    """Whether what follows a checkpoint works in the run's directory."""
    if not snapshot.values.get("profile"):
        return bool(snapshot.values.get("run", work.name) == work.name)
    node = snapshot.tasks[0].name if snapshot.tasks else ""
    checkpoint = snapshot.config["configurable"]["checkpoint_id"]
    return name_directory(State.model_validate(snapshot.values), node, checkpoint, work.thread) == work.name


def _stream(app: App, work: Work, settings: RunnableConfig, state: State | None) -> int:
    """Stream the graph into the display, with a person's answers where it asks. Raises UserError."""
    control, stop = RunControl(), Event()
    with ExitStack() as shown:
        if work.listener:
            from graph.show.live import address, serve

            print(f"live page: {address(work.listener)}", flush=True)
            # a second run is served behind this one, and a server closes its socket
            shown.enter_context(serve(work.directory, work.listener.dup()))
        display = shown.enter_context(open_display(Console()))

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
            with explain_lost_state(), stop_at(stop):
                while True:
                    with _drain_on_signal(control, stop, display, stop_at_once):
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
        except DamagedArtifact as error:
            return _stop(display, work, f"{error}; {advise(work.directory)}")
        except (AgentError, BrokenBaseline, BrokenPlan, StateLost, Stopped, Unanswered) as error:
            return _stop(display, work, str(error))


def _ask(display: Display, question: dict[str, Any]) -> str:
    """A line that a person says to a plan. Raises Unanswered."""
    if "brief" in question:
        waiting = "what was made of the goal waits for a person to accept or edit it"
    else:
        waiting = f"plan {question['iteration']} waits for a person to accept, edit or refuse it"
    if question["problem"]:
        waiting += f", for it cannot be carried out as it was edited: {question['problem']}"
    if sys.stdin is None or not sys.stdin.isatty():
        raise Unanswered(f"{waiting}{'; ' if question['problem'] else ': '}resume in a terminal, or answer in Studio")
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
    began = follow_new_texts(follow_brief(work.config, state.brief), state.written)
    if work.config.takes_parts:  # whose sparsity is known since the model was opened
        began = began.model_copy(update={"target_sparsity": state.config.target_sparsity})
    if changed := [field for field in fields if getattr(state.config, field) != getattr(began, field)]:
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
        **({"aim": work.config.aim} if work.config.aim else {}),
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
def _drain_on_signal(
    control: RunControl, stop: Event, display: Display, stop_at_once: Callable[[], None]
) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run at the next layer, window of text or step, a second one at once."""

    def ask(_number: int, _frame: Any) -> None:
        if control.drain_requested:
            stop_at_once()
        control.request_drain("signal")
        stop.set()
        text = "stopping at the next layer, window of text or step; once more stops at once"
        display.show({"type": "note", "text": text})

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
