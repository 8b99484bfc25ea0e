"""One SQLite file per runs directory: the checkpoints of every run, and the memory store.

`python -m graph.run` opens it with `open_saver` and `open_store`; `langgraph dev` opens the same file
with `checkpointer` and `store`, named in langgraph.json, so that each sees what the other has done.
Nothing in it is pickled: checkpoints are msgpack that revives our state models and no other class,
the store is JSON.
"""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import aiosqlite
from filelock import FileLock
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.store.sqlite import AsyncSqliteStore, SqliteStore
from pydantic import BaseModel

from graph.config import RunConfig
from graph.state import Input, Lesson, Plan, State, Trial, Usage
from tools.errors import UserError
from tools.recipes import Adjustment, Recipe

RUNS_DIR_VARIABLE = "BILLHOOK_RUNS_DIR"

# A writer holds the file for milliseconds; a minute of waiting means a disk or a process that hangs.
BUSY_SECONDS = 60.0

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


def runs_directory() -> Path:
    """Where runs live when nothing else is said: `BILLHOOK_RUNS_DIR`, or runs/ in the present directory."""
    return Path(os.environ.get(RUNS_DIR_VARIABLE) or "runs")


def database(runs_dir: Path) -> Path:
    """The SQLite file of a runs directory."""
    return runs_dir / "billhook.sqlite"


def serializer() -> JsonPlusSerializer:
    """Msgpack without pickle that revives the state models and LangGraph's own types only."""
    return JsonPlusSerializer(pickle_fallback=False, allowed_msgpack_modules=STATE_MODELS)


@contextmanager
def open_saver(runs_dir: Path) -> Iterator[SqliteSaver]:
    """The checkpoints of all runs in `runs_dir`; UserError when the file cannot be opened or made."""
    create_tables(runs_dir)
    with closing(_connect(database(runs_dir))) as connection:
        yield SqliteSaver(connection, serde=serializer())


@contextmanager
def open_store(runs_dir: Path) -> Iterator[SqliteStore]:
    """The memory of all runs in `runs_dir`; UserError when the file cannot be opened or made."""
    create_tables(runs_dir)
    with closing(_connect(database(runs_dir), isolation_level=None)) as connection:
        memory = SqliteStore(connection)
        memory.setup()
        yield memory


@asynccontextmanager
async def checkpointer() -> AsyncIterator[AsyncSqliteSaver]:
    """What `langgraph dev` checkpoints with; UserError when the file cannot be opened or made."""
    runs_dir = runs_directory()
    await asyncio.to_thread(create_tables, runs_dir)  # the server forbids blocking calls on its loop
    async with aiosqlite.connect(database(runs_dir), timeout=BUSY_SECONDS) as connection:
        saver = AsyncSqliteSaver(connection, serde=serializer())
        await saver.setup()
        yield saver


@asynccontextmanager
async def store() -> AsyncIterator[AsyncSqliteStore]:
    """What `langgraph dev` remembers with; UserError when the file cannot be opened or made."""
    runs_dir = runs_directory()
    await asyncio.to_thread(create_tables, runs_dir)
    async with aiosqlite.connect(
        database(runs_dir), timeout=BUSY_SECONDS, factory=_Connection, isolation_level=None
    ) as connection:
        memory = AsyncSqliteStore(connection)
        await memory.setup()
        yield memory


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
