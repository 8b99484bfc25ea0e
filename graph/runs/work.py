"""Which run is worked on: a new one, one that was begun, or the repeat of another."""

import shlex
import uuid
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

from langchain_core.runnables import RunnableConfig

from graph.config import CHANGEABLE, RunConfig, read_config
from graph.llm.models import check_agents
from graph.runs.directory import check_input, create_run, read_replay, read_run, write_config
from graph.runs.replay import read_record
from tools.base.errors import UserError
from tools.base.rundir import lock_run
from tools.base.settings import CutSettings

STEPS_PER_ITERATION = 7
"""profile again, plan, approve, prune, validate, accept or roll back, reflect."""

OF_CUTS = ("target_size", *CutSettings.model_fields)
"""Fields that say what a cut takes away: a replay repeats them."""


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
        place = f" --runs-dir {shlex.quote(str(runs_dir))}" if str(runs_dir) != "runs" else ""
        return f"python -m graph.run --resume {self.name}{place}{f' --push-to-hub {self.push}' if self.push else ''}"


def start(runs_dir: Path, name: str | None, flags: dict[str, Any], path: Path) -> Work:
    """A new run by a config file and flags, its directory made and locked. Raises UserError."""
    config = read_config(flags, path)
    check_agents(config)
    return _create(runs_dir, name, path.stem, config)


def start_replay(runs_dir: Path, replay: str, name: str | None, flags: dict[str, Any]) -> Work:
    """A new run that repeats another, with its config but for the flags. Raises UserError."""
    _, config = read_run(runs_dir, replay)
    if not read_record(replay).plans:
        raise UserError(f"the record of run {replay!r} holds no plan to repeat")
    again = read_config({**config.model_dump(), **flags}, None)
    if other := [option for option in OF_CUTS if getattr(again, option) != getattr(config, option)]:
        raise UserError(f"a replay takes away what run {replay!r} took away; leave {' and '.join(other)} out")
    return _create(runs_dir, name, f"{replay}-replay", again, replay)


def _create(runs_dir: Path, name: str | None, stem: str, config: RunConfig, replay: str = "") -> Work:
    check_input(config)
    name = _free_name(runs_dir, stem) if name is None else name
    thread = str(uuid.uuid4())
    create_run(runs_dir, name, config, thread, replay)
    return Work(runs_dir / name, config, thread, replay)


def _free_name(runs_dir: Path, stem: str) -> str:
    """The config's name, with a number when a run has it already."""
    names = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(name for name in names if not (runs_dir / name).exists())


def resume(runs_dir: Path, name: str, flags: dict[str, Any], path: Path | None) -> Work:
    """A run that was begun, its directory locked; flags and config file may only say again what it was begun with.

    Raises UserError.
    """
    thread, config = read_run(runs_dir, name)
    replay = read_replay(runs_dir / name)
    wanted = read_config(flags if path else {**config.model_dump(), **flags}, path)
    changed = [option for option in RunConfig.model_fields if getattr(wanted, option) != getattr(config, option)]
    if refused := [option for option in changed if option not in CHANGEABLE]:
        raise UserError(f"run {name!r} cannot be resumed with a changed config ({', '.join(refused)}); start a new run")
    if not replay and not (runs_dir / name / "summary.json").is_file():  # else no agent is asked any more
        check_agents(wanted)
    lock_run(runs_dir / name)
    if changed:
        write_config(runs_dir / name, wanted)
    return Work(runs_dir / name, wanted, thread, replay, resumed=True)
