"""Where checkpoints and memory are kept: one SQLite file per runs directory, or a PostgreSQL database by its URL.

`python -m graph.run` opens them with `open_saver` and `open_store`; `langgraph dev` opens the same ones
with `checkpointer` and `store`, named in langgraph.json, so that each sees what the other has done.
Nothing is pickled: checkpoints are msgpack (`serializer.py`), the store is JSON.
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from sqlite3 import DatabaseError
from types import ModuleType

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.base import BaseStore

from graph.persistence import sqlite
from graph.persistence.serializer import DamagedState, make_serializer
from tools.base.errors import UserError
from tools.base.files import is_disk_full
from tools.base.rundir import runs_directory

STATE_VARIABLE = "BILLHOOK_STATE"


class StateLost(RuntimeError):
    """The database went away in the middle of a run; what was checkpointed stands."""


def state_url() -> str:
    """The PostgreSQL database that keeps checkpoints and memory, from `BILLHOOK_STATE`; empty for SQLite.

    Raises UserError when the variable holds something else.
    """
    url = os.environ.get(STATE_VARIABLE) or ""
    if url and not url.startswith(("postgresql://", "postgres://")):
        raise UserError(f"--state (or {STATE_VARIABLE}) takes postgresql://HOST/DATABASE, or nothing for SQLite")
    return url


def state_kind() -> str:
    """Where checkpoints and memory are kept, in a word that holds no password."""
    return "PostgreSQL" if state_url() else "SQLite"


def _postgres() -> ModuleType:
    """The module for PostgreSQL. Raises UserError where its packages are missing."""
    try:
        from graph.persistence import postgres
    except ImportError as error:
        advice = "install them with: pip install -e '.[postgres]'"
        raise UserError(f"the packages for PostgreSQL are not installed; {advice}") from error
    return postgres


@contextmanager
def open_saver(runs_dir: Path) -> Iterator[BaseCheckpointSaver[str]]:
    """The checkpoints of all runs in `runs_dir`; UserError when they cannot be opened or made."""
    url = state_url()
    serde = make_serializer()
    with _postgres().open_saver(url, serde) if url else sqlite.open_saver(runs_dir, serde) as saver:
        yield saver


@contextmanager
def open_store(runs_dir: Path) -> Iterator[BaseStore]:
    """The memory of all runs in `runs_dir`; UserError when it cannot be opened or made."""
    url = state_url()
    with _postgres().open_store(url) if url else sqlite.open_store(runs_dir) as memory:
        yield memory


@asynccontextmanager
async def checkpointer() -> AsyncIterator[BaseCheckpointSaver[str]]:
    """What `langgraph dev` checkpoints with; UserError when it cannot be opened or made."""
    url = state_url()
    opened = (
        _postgres().checkpointer(url, make_serializer())
        if url
        else sqlite.checkpointer(runs_directory(), make_serializer())
    )
    async with opened as saver:
        yield saver


@asynccontextmanager
async def store() -> AsyncIterator[BaseStore]:
    """What `langgraph dev` remembers with; UserError when it cannot be opened or made."""
    url = state_url()
    async with _postgres().store(url) if url else sqlite.store(runs_directory()) as memory:
        yield memory


@contextmanager
def explain_damaged_state(runs_dir: Path) -> Iterator[None]:
    """Turn errors of a damaged SQLite file, or of a checkpoint that is not what was written, into UserError."""
    file = sqlite.database(runs_dir)
    try:
        yield
    except DatabaseError as error:
        if is_disk_full(error):
            raise
        raise UserError(sqlite.explain_damage(file, error)) from error
    except DamagedState as error:
        place = "the state's database" if state_url() else file
        raise UserError(f"{place} is damaged: {error}; put it back as it was, or begin a new run") from error


@contextmanager
def explain_lost_state() -> Iterator[None]:
    """Turn an error of the PostgreSQL database into StateLost."""
    if not state_url():
        yield
        return
    try:
        yield
    except _postgres().Error as error:
        raise StateLost(f"the state's database does not answer: {' '.join(str(error).split())}") from error
