"""A run's directory: made, locked, and read again; `run.json` names its thread, `config.yaml` all its options."""

import re
import shlex
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

import yaml
from langchain_core.runnables import RunnableConfig

from graph.checks import check_budget, check_target, refuse_prompt_files
from graph.config import CHANGEABLE, RunConfig, check_config, read_config
from graph.llm.models import check_agents
from graph.persistence import state_kind
from graph.runs.replay import read_record
from graph.state import State
from tools.base.errors import DamagedFile, UserError
from tools.base.files import write_json, write_text
from tools.base.named import RUN_NAME
from tools.base.rundir import FORMAT, lock_run, read_config_values, read_made, runs_directory
from tools.base.settings import CutSettings
from tools.measure.benchmarks import load_benchmarks, refuse_shared_questions
from tools.models.load import check_device, locate_model
from tools.texts.windows import check_texts


def directory_of(state: State) -> Path:
    """The directory of the state's run."""
    return runs_directory() / state.run


def check_input(config: RunConfig) -> None:
    """Refuse what can be refused before anything is loaded. Raises UserError."""
    refuse_prompt_files(config)
    check_target(config)
    check_budget(config)
    locate_model(config.model)
    check_device(config.device)
    check_texts(config)
    load_benchmarks(config, config.dtype)
    refuse_shared_questions(config, config)


def check_name(name: str) -> None:
    """Raises UserError for what cannot be the name of a run."""
    if not re.fullmatch(RUN_NAME, name):
        raise UserError(
            f"run name {name!r} must be letters, digits, '.', '_' or '-', at most 100 of them, and begin with a letter "
            "or digit"
        )


def create_run(
    runs_dir: Path,
    name: str,
    config: RunConfig,
    thread_id: str,
    replay: str = "",
) -> Path:
    """Make and lock a run's directory, with `config.yaml` as resolved and `run.json`.

    Calling again for the same thread changes nothing. Raises UserError when another run has the name or another
    process works in it.
    """
    check_name(name)
    directory = runs_dir / name
    record = directory / "run.json"
    if record.is_file() and read_run(runs_dir, name)[0] == thread_id:
        lock_run(directory)
        return directory
    if record.is_file() or (directory.is_dir() and not _is_unborn(directory)):
        raise UserError(
            f"run {name!r} exists already in {runs_dir}; resume it with --resume {name}, or choose another --name"
        )
    try:
        lock_run(directory)
        write_config(directory, config)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        begun = config.model_dump(mode="json", exclude={*CHANGEABLE, *_unsaid(config)})
        made = {"thread_id": thread_id, "created": created, "state": state_kind(), "replay": replay}
        write_json(record, {"format": FORMAT, **made, "config": begun})
    except OSError as error:
        raise UserError(f"run directory {directory} cannot be written: {error.strerror}") from error
    return directory


def write_config(directory: Path, config: RunConfig) -> None:
    """Write a run's `config.yaml`."""
    values = config.model_dump(exclude=_unsaid(config))
    write_text(directory / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _unsaid(config: RunConfig) -> set[str]:
    """Options that a run's files leave out: the sparsity that a size comes to is not known yet."""
    return {"target_sparsity"} if config.takes_parts else set()


def _is_unborn(directory: Path) -> bool:
    """Whether a directory holds no more than a start leaves that was killed before it wrote `run.json`."""
    return all(path.name == "config.yaml" or path.name.startswith(".") for path in directory.iterdir())


def read_run(runs_dir: Path, name: str) -> tuple[str, RunConfig]:
    """(thread id, config) of a run. Raises UserError when there is no such run or its files cannot be read."""
    directory = runs_dir / name
    if Path(name).name != name or not (directory / "run.json").is_file():
        raise UserError(f"there is no run {name!r} in {runs_dir}; see --list")
    try:
        thread = read_made(directory)["thread_id"]
        return str(uuid.UUID(thread)), check_config(read_config_values(directory))
    except DamagedFile:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"run {name!r} cannot be read: {' '.join(str(error).split())[:300]}") from error


def read_replay(directory: Path) -> str:
    """The run that the one in `directory` replays, "" for none. UserError when its checkpoints are in another place."""
    made = read_made(directory)
    kept = made["state"]
    if kept != state_kind():
        advice = "name it with --state or in BILLHOOK_STATE" if kept == "PostgreSQL" else "leave --state out"
        raise UserError(f"run {directory.name!r} keeps its checkpoints in {kept}: {advice}")
    return str(made["replay"])


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
