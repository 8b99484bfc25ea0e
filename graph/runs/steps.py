"""What is done around every node: a fork gets its own directory, caps may be raised, and a run can be cancelled."""

import asyncio
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Any

from langgraph.errors import GraphBubbleUp
from langgraph.runtime import Runtime

from graph.config import CHANGEABLE, RunConfig
from graph.llm.local import close_local
from graph.runs.directory import create_run, directory_of, read_run
from graph.runs.permits import check_permitted
from graph.state import State
from tools.base.files import write_whole
from tools.base.progress import stop_at
from tools.base.rundir import (
    check_log,
    hold_run,
    read_log,
    read_made,
    rewrite_log,
    runs_directory,
    scan_events,
    unlock_runs,
)
from tools.workbench.open import close_workbench


def name_directory(state: State, node: str, checkpoint: str, thread: str | None) -> str:
    """Name of the directory that a node works in from a checkpoint: the state's run, or a fork of it.

    The name of a fork is made from where it begins, so that it is the same after a kill.
    """
    if not _is_fork(state, node, checkpoint, thread):
        return state.run
    mark = hashlib.sha256(f"{thread} {checkpoint}".encode()).hexdigest()[:6]
    return f"{re.sub(r'-fork-[0-9a-f]{6}$', '', state.run)[:80]}-fork-{mark}"


def _is_fork(state: State, node: str, checkpoint: str, thread: str | None) -> bool:
    """Whether a node is about to work on another line of checkpoints than the one its run's directory belongs to.

    The directory's line is known by the node that worked there last and the checkpoint it worked from. It is followed
    by what that node led to (nothing, "", after the last), or by that node again: after a kill from the same
    checkpoint, after an edit from one with the same past.
    """
    directory = directory_of(state)
    with suppress(OSError, ValueError, KeyError, TypeError):
        owner = read_made(directory)["thread_id"]
        if thread is not None and owner != thread:
            return True
    last = read_last_node(directory)
    if not last.get("checkpoint") or last["checkpoint"] == checkpoint:
        return False
    if state.came_from == last["checkpoint"]:
        return bool(node) and bool(last["node"] == "finish")
    again = state.came_from == last["came_from"] and node == last["node"]
    return not again or (directory / "summary.json").is_file()


def read_last_node(directory: Path) -> dict[str, Any]:
    """The event of the node that was last at work in a directory; empty where there is none."""
    nodes = scan_events(directory, "node")
    return nodes[-1][1] if nodes else {}


def fork_run(state: State, name: str, thread: str) -> None:
    """Make the directory of a fork, with what its run had when it was left. Again, it changes nothing.

    Artifacts are shared as hard links where the file system has them: they are never written twice.
    """
    origin = directory_of(state)
    directory = create_run(runs_directory(), name, state.config, thread, state.replay)
    for part in ("artifacts", "evaluations"):
        for file in (origin / part).rglob("*"):
            target = directory / file.relative_to(origin)
            if file.is_file() and not file.name.startswith(".") and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                _share(file, target)
    begun = list(read_log(directory))  # a fork that is resumed has said so already
    if not any(b'"type": "fork"' in line[:100] for line in begun):
        event = {"time": round(time.time(), 3), "type": "fork", "from": state.run, "iteration": state.iteration}
        lines = [*_read_past(origin, state.came_from), json.dumps(event).encode(), *begun]
        rewrite_log(directory, lines)


def _share(file: Path, target: Path) -> None:
    if file.suffix != ".jsonl":  # the index grows
        with suppress(OSError):
            os.link(file, target)
            return
    write_whole(target, lambda aside: shutil.copyfile(file, aside))


def _read_past(origin: Path, checkpoint: str) -> list[bytes]:
    """The events of a run up to the end of the node that worked from a checkpoint."""
    lines = list(read_log(origin))
    nodes = scan_events(origin, "node")
    last = max((number for number, event in nodes if event.get("checkpoint") == checkpoint), default=-1)
    end = next((number for number, _ in nodes if number > last), len(lines))
    return lines[:end]


Update = dict[str, Any]
Node = Callable[[State, Runtime[RunConfig]], Update]

IDLE_SECONDS = 30.0
"""How long a server keeps the model for a run's next node; after that the run can be taken up anywhere."""


def step(node: Node, *, served: bool = False) -> Node:
    """A node as the command line runs it; `served`, one that first refuses what a server may not do."""

    @wraps(node)
    def work(state: State, runtime: Runtime[RunConfig]) -> Update:
        checkpoint, thread = "", None
        if runtime.execution_info is not None:
            checkpoint, thread = runtime.execution_info.checkpoint_id, runtime.execution_info.thread_id
        settled = state.model_copy(update={"config": choose_config(state, runtime.context)})
        if served:
            check_permitted(settled)
        moved: Update = {}
        if state.profile:
            if served:
                check_permitted(state)  # a fork's config.yaml says what the run began with
            check_log(directory_of(state))
            name = name_directory(state, node.__name__, checkpoint, thread)
            if name != state.run:
                fork_run(state, name, thread or "")
                moved = {"run": name}
            if runtime.context is not None:
                runtime = runtime.override(context=settled.config)
        state = settled.model_copy(update=moved)
        with hold_run(directory_of(state)) if state.profile else nullcontext():
            return moved | node(state, runtime) | {"came_from": checkpoint}

    return work


def step_of_server(node: Node) -> Callable[[State, Runtime[RunConfig]], Coroutine[Any, Any, Update]]:
    """A node as Studio's server runs it: cancelling the run stops it before its next layer or window of text.

    The node itself stays in a thread, which no one can stop from outside; it holds the run's directory until it leaves,
    and the lock on the model while it works on it, so that the next run waits for it.
    """
    work = step(node, served=True)

    def work_until(cancelled: threading.Event, state: State, runtime: Runtime[RunConfig]) -> Update:
        keep = False
        keeper.begin()
        try:
            with stop_at(cancelled):
                update = work(state, runtime)
            keep = node.__name__ != "finish" and not cancelled.is_set()
            return update
        except GraphBubbleUp:  # it asks a person
            keep = True
            raise
        finally:
            keeper.end(keep)

    @wraps(node)
    async def run(state: State, runtime: Runtime[RunConfig]) -> Update:
        cancelled = threading.Event()
        try:
            return await asyncio.to_thread(work_until, cancelled, state, runtime)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    return run


class Keeper:
    """Keeps the model and the run's directory from one node of a server's run to the next, but not for ever.

    Nobody tells when no next node will come: a run is cancelled between two nodes, or asks a person who has left.
    """

    def __init__(self) -> None:
        self._lock, self._at_work = threading.Lock(), 0
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """A node begins."""
        with self._lock:
            self._at_work += 1
            if self._timer is not None:
                self._timer.cancel()

    def end(self, keep: bool) -> None:
        """A node ends, and another is to be expected or not."""
        with self._lock:
            self._at_work -= 1
            if self._at_work:
                return
            if not keep:
                let_go()
                return
            self._timer = threading.Timer(IDLE_SECONDS, self._rest)
            self._timer.daemon = True  # the server does not wait for it to end
            self._timer.start()

    def _rest(self) -> None:
        with self._lock:
            if not self._at_work:
                let_go()


keeper = Keeper()


def let_go() -> None:
    """Close the model at work and those of the agents, and free every run's directory."""
    close_local()
    close_workbench()
    unlock_runs()


def choose_config(state: State, context: RunConfig | None) -> RunConfig:
    """The config that a node works by, as the context makes it; a server fills in there what a caller left out.

    A new run's is the context, or that of the run that it replays with what the context names; later only what may
    change. Raises UserError when the run to replay cannot be read.
    """
    named = {name: getattr(context, name) for name in context.model_fields_set} if context is not None else {}
    if state.profile:
        changes = {name: value for name, value in named.items() if name in CHANGEABLE}
        return state.config.model_copy(update=changes)
    if state.replay:
        return read_run(runs_directory(), state.replay)[1].model_copy(update=named)
    return context or RunConfig()  # the library hands over None where the caller gave none
