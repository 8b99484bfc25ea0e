"""Where checkpoints and memory are kept: one SQLite file per runs directory, or a PostgreSQL database by its URL.

`python -m graph.run` opens them with `open_saver` and `open_store`; `langgraph dev` opens the same ones
with `checkpointer` and `store`, named in langgraph.json, so that each sees what the other has done.
Nothing is pickled: checkpoints are compressed msgpack that revives our state models and no other class,
the store is JSON.
"""

import asyncio
import os
import sqlite3
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import aiosqlite
from filelock import FileLock
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.store.base import BaseStore
from langgraph.store.sqlite import AsyncSqliteStore, SqliteStore
from pydantic import BaseModel

from graph.config import RunConfig
from graph.planning.plan import Plan
from graph.reflecting.schema import Lesson
from graph.state import Input, State, Trial
from tools.base.errors import UserError
from tools.base.rundir import RUNS_DIR_VARIABLE as RUNS_DIR_VARIABLE
from tools.base.rundir import runs_directory as runs_directory
from tools.plans.recipe import Adjustment, Recipe
from tools.results.schema import Usage

STATE_VARIABLE = "BILLHOOK_STATE"

# A writer holds the file for milliseconds; a minute of waiting means a disk or a process that hangs.
BUSY_SECONDS = 60.0

WORTH_COMPRESSING = 512
"""Bytes from which a part of a checkpoint is compressed."""

# Every class that a checkpoint may revive. Another one would come back as a plain dict.
STATE_MODELS: tuple[type[BaseModel], ...] = (
    Adjustment,
    Input,
    Lesson,
    Plan,
    Recipe,
    RunConfig,
    State,
    Trial,
    Usage,
)


class _Connection(sqlite3.Connection):
    """A connection whose transactions take the write lock at once.

    The store opens a plain BEGIN, reads, and then writes. When another process has written in
    between, SQLite refuses the write with "database is locked", and no busy timeout helps.
    """

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        return super().execute("BEGIN IMMEDIATE" if sql == "BEGIN" else sql, parameters)


def database(runs_dir: Path) -> Path:
    """The SQLite file of a runs directory."""
    return runs_dir / "billhook.sqlite"


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


class _Compressed(JsonPlusSerializer):
    """Msgpack, compressed: the savers keep the whole state at every step, and trials and lessons repeat themselves."""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, data = super().dumps_typed(obj)
        return (f"{kind}+zlib", zlib.compress(data)) if len(data) >= WORTH_COMPRESSING else (kind, data)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        kind, packed = data
        if kind.endswith("+zlib"):
            return super().loads_typed((kind.removesuffix("+zlib"), zlib.decompress(packed)))
        return super().loads_typed(data)


def serializer() -> JsonPlusSerializer:
    """Msgpack without pickle that revives the state models and LangGraph's own types only."""
    return _Compressed(pickle_fallback=False, allowed_msgpack_modules=STATE_MODELS)


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
    if url := state_url():
        with _postgres().open_saver(url, serializer()) as saver:
            yield saver
        return
    create_tables(runs_dir)
    with closing(_connect(database(runs_dir))) as connection:
        yield SqliteSaver(connection, serde=serializer())


@contextmanager
def open_store(runs_dir: Path) -> Iterator[BaseStore]:
    """The memory of all runs in `runs_dir`; UserError when it cannot be opened or made."""
    if url := state_url():
        with _postgres().open_store(url) as memory:
            yield memory
        return
    create_tables(runs_dir)
    with closing(_connect(database(runs_dir), isolation_level=None)) as connection:
        memory = SqliteStore(connection)
        memory.setup()
        yield memory


@asynccontextmanager
async def checkpointer() -> AsyncIterator[BaseCheckpointSaver[str]]:
    """What `langgraph dev` checkpoints with; UserError when it cannot be opened or made."""
    if url := state_url():
        async with _postgres().checkpointer(url, serializer()) as saver:
            yield saver
        return
    runs_dir = runs_directory()
    await asyncio.to_thread(create_tables, runs_dir)  # the server forbids blocking calls on its loop
    async with aiosqlite.connect(database(runs_dir), timeout=BUSY_SECONDS) as connection:
        saver = AsyncSqliteSaver(connection, serde=serializer())
        await saver.setup()
        yield saver


@asynccontextmanager
async def store() -> AsyncIterator[BaseStore]:
    """What `langgraph dev` remembers with; UserError when it cannot be opened or made."""
    if url := state_url():
        async with _postgres().store(url) as memory:
            yield memory
        return
    runs_dir = runs_directory()
    await asyncio.to_thread(create_tables, runs_dir)
    async with aiosqlite.connect(
        database(runs_dir), timeout=BUSY_SECONDS, factory=_Connection, isolation_level=None
    ) as connection:
        memory = AsyncSqliteStore(connection)
        await memory.setup()
        yield memory


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


def create_tables(runs_dir: Path) -> None:
    """Make the SQLite file and its tables; UserError with one line when it cannot.

    Under a lock, because the migrations of LangGraph's store fail when two processes run them at once.
    """
    file = database(runs_dir)
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(f"{file}.lock", timeout=BUSY_SECONDS),
            closing(_connect(file, isolation_level=None)) as connection,
        ):
            SqliteSaver(connection, serde=serializer()).setup()
            SqliteStore(connection).setup()
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"cannot open {file}: {error}") from error


def _connect(file: Path, **options: Any) -> sqlite3.Connection:
    # LangGraph calls savers and stores from worker threads and guards them with its own lock.
    return sqlite3.connect(file, timeout=BUSY_SECONDS, check_same_thread=False, factory=_Connection, **options)
