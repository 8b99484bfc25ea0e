"""Which run is worked on: a new one, one that was begun, the repeat of another, or the second one of two targets."""

import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from socket import socket
from typing import Any

from langchain_core.runnables import RunnableConfig

from graph.config import CHANGEABLE, RunConfig, read_config
from graph.llm.models import check_agents
from graph.runs.directory import check_input, check_name, create_run, read_replay, read_run, write_config
from graph.runs.replay import read_record
from graph.runs.second import (
    OF_CUTS,
    ONLY_SECOND,
    follow_cut,
    keep_brief,
    leave_caps,
    name_second,
    read_configs,
    read_second,
)
from tools.base.errors import UserError
from tools.base.rows import follow_kept
from tools.base.rundir import lock_run
from tools.results.page.record import read_run as read_told

STEPS_PER_ITERATION = 7
"""profile again, plan, approve, prune, validate, accept or roll back, reflect."""


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
    given: Mapping[str, Any] = field(default_factory=dict)
    """Of a run that is gone on with, the options that were given anew, such as workers and caps."""

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
    config, second = read_configs(flags, path)
    check_agents(config)
    return _create(runs_dir, name, path.stem, config, second=second)


def start_replay(runs_dir: Path, replay: str, name: str | None, flags: dict[str, Any]) -> Work:
    """A new run that repeats another, with its config but for the flags. Raises UserError."""
    _, config = read_run(runs_dir, replay)
    if not read_record(replay).plans:
        raise UserError(f"the record of run {replay!r} holds no plan to repeat")
    second = read_second(runs_dir / replay, {option: flags[option] for option in flags if option not in OF_CUTS})
    again = read_config({**config.model_dump(), **_take_first(flags, second)}, None)
    if other := [option for option in OF_CUTS if getattr(again, option) != getattr(config, option)]:
        raise UserError(f"a replay takes away what run {replay!r} took away; leave {' and '.join(other)} out")
    return _create(runs_dir, name, f"{replay}-replay", again, replay, second)


def _take_first(flags: dict[str, Any], second: RunConfig | None) -> dict[str, Any]:
    """The flags that are about the run itself, and not about a second one alone."""
    return flags if second is None else {name: flags[name] for name in flags if name not in ONLY_SECOND}


def _create(
    runs_dir: Path, name: str | None, stem: str, config: RunConfig, replay: str = "", second: RunConfig | None = None
) -> Work:
    for options in (config, second) if second else (config,):
        check_input(options)
    name = _free_name(runs_dir, stem) if name is None else name
    if second:
        check_name(name_second(name))
    if second and (behind := runs_dir / name_second(name)).exists():
        raise UserError(
            f"run {behind.name!r}, as the zeros would be called, exists already in {runs_dir}; give another --name"
        )
    thread = str(uuid.uuid4())
    create_run(runs_dir, name, config, thread, replay, second=second)
    return Work(runs_dir / name, config, thread, replay)


def _free_name(runs_dir: Path, stem: str) -> str:
    """The config's name, with a number when a run has it already, or its second one."""
    names = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(name for name in names if not any((runs_dir / x).exists() for x in (name, name_second(name))))


def resume(runs_dir: Path, name: str, flags: dict[str, Any], path: Path | None) -> Work:
    """A run that was begun, its directory locked; flags and config file may only say again what it was begun with.

    Raises UserError.
    """
    thread, config = read_run(runs_dir, name)
    replay = read_replay(runs_dir / name)
    second = read_second(runs_dir / name)
    if second != read_second(runs_dir / name, {option: flags[option] for option in flags if option in ONLY_SECOND}):
        raise UserError(f"run {name!r} cannot be resumed with another second target; start a new run")
    own = _take_first(flags, second)
    wanted = read_configs(flags, path)[0] if path else read_config({**config.model_dump(), **own}, None)
    wanted = follow_kept(wanted, config.model_dump())
    changed = [option for option in RunConfig.model_fields if getattr(wanted, option) != getattr(config, option)]
    if refused := [option for option in changed if option not in CHANGEABLE]:
        raise UserError(f"run {name!r} cannot be resumed with a changed config ({', '.join(refused)}); start a new run")
    if not replay and not (runs_dir / name / "summary.json").is_file():  # else no agent is asked any more
        check_agents(wanted)
    lock_run(runs_dir / name)
    if changed:
        write_config(runs_dir / name, wanted)
    given = {option: getattr(wanted, option) for option in CHANGEABLE if option in flags or option in changed}
    return Work(runs_dir / name, wanted, thread, replay, resumed=True, given=given)


def find_second(work: Work, second: RunConfig) -> Work | None:
    """The run that goes on from the model of one that has ended, begun or gone on with; None where it cannot.

    Raises UserError.
    """
    runs_dir, name = work.directory.parent, name_second(work.name)
    cut, replay = read_told(work.directory), name_second(work.replay) if work.replay else ""
    if (runs_dir / name / "run.json").is_file():
        further = resume(runs_dir, name, {**work.given, **leave_caps(work.given, cut)}, None)
    else:
        if cut.summary is None or cut.summary.status != "finished":
            undone = "no zeros are set, and nothing is pushed" if work.push else "no zeros are set"
            print(f"run {work.name} is short of its target, and {undone}: see {work.directory / 'report.html'}")
            return None
        if replay and not ((runs_dir / replay / "run.json").is_file() and read_record(replay).plans):
            print(f"run {work.replay} has set no zeros in what stayed that could be repeated")
            return None
        second = keep_brief(second, read_record(work.name).brief)
        config = follow_cut(second, work.config, cut, work.directory / "model")
        further = _create(runs_dir, name, name, config, replay)
    return replace(further, push=work.push, listener=work.listener)
