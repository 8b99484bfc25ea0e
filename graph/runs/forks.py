"""A fork of a run works in a directory of its own.

A run's directory belongs to one line of checkpoints. In Studio a person may go on from an older one (edited or not),
or copy the thread: the first node that notices moves to a new directory, which begins with what the run knew then.
"""

import hashlib
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from graph.runs.directory import create_run, directory_of
from graph.state import State
from tools.base.files import write_whole
from tools.base.made import read_made
from tools.base.rundir import read_log, rewrite_log, runs_directory, scan_events


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
