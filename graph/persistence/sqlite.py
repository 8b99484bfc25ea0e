"""Checkpoints and memory in one SQLite file of the runs directory, which several processes may have open at once."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import aiosqlite
from filelock import FileLock
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.store.sqlite import AsyncSqliteStore, SqliteStore

from graph.persistence.serializer import TellingSaver
from tools.base.errors import UserError, in_one_line

# A writer holds the file for milliseconds; a minute of waiting means a disk or a process that hangs.
BUSY_SECONDS = 60.0


class _Connection(sqlite3.Connection):
    """A connection whose transactions take the write lock at once.

    The store opens a plain BEGIN, reads, and then writes. When another process has written in
    between, SQLite refuses the write with "database is locked", and no busy timeout helps.
    """

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        return super().execute("BEGIN IMMEDIATE" if sql == "BEGIN" else sql, parameters)


class _Saver(TellingSaver, SqliteSaver):
    pass


class _AsyncSaver(TellingSaver, AsyncSqliteSaver):
    pass


def database(runs_dir: Path) -> Path:
    """The SQLite file of a runs directory."""
    return runs_dir / "billhook.sqlite"


@contextmanager
def open_saver(runs_dir: Path, serde: SerializerProtocol) -> Iterator[SqliteSaver]:
    """The checkpoints of all runs in `runs_dir`; UserError when they cannot be opened or made."""
    create_tables(runs_dir)
    with closing(_connect(database(runs_dir))) as connection:
        yield _Saver(connection, serde=serde)


@contextmanager
def open_store(runs_dir: Path) -> Iterator[SqliteStore]:
    """The memory of all runs in `runs_dir`; UserError when it cannot be opened or made."""
    create_tables(runs_dir)
    with closing(_connect(database(runs_dir), isolation_level=None)) as connection:
        memory = SqliteStore(connection)
        memory.setup()
        yield memory


@asynccontextmanager
async def checkpointer(runs_dir: Path, serde: SerializerProtocol) -> AsyncIterator[AsyncSqliteSaver]:
    """What `langgraph dev` checkpoints with; UserError as in `open_saver`."""
    await asyncio.to_thread(create_tables, runs_dir)  # the server forbids blocking calls on its loop
    async with aiosqlite.connect(database(runs_dir), timeout=BUSY_SECONDS) as connection:
        saver = _AsyncSaver(connection, serde=serde)
        await saver.setup()
        yield saver


@asynccontextmanager
async def store(runs_dir: Path) -> AsyncIterator[AsyncSqliteStore]:
    """What `langgraph dev` remembers with; UserError as in `open_store`."""
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
            _check_pages(connection)
            SqliteSaver(connection).setup()
            SqliteStore(connection).setup()
    except sqlite3.DatabaseError as error:
        raise UserError(explain_damage(file, error)) from error
    except OSError as error:
        raise UserError(f"cannot open {file}: {error}") from error


def _check_pages(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError where tables and their indices do not say the same, as after damage to a key."""
    found = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if found != [("ok",)]:
        raise sqlite3.DatabaseError(in_one_line(ValueError(found[0][0]), 200))


def explain_damage(file: Path, error: BaseException) -> str:
    """What is to be done where the SQLite file cannot be read."""
    return (
        f"cannot open {file}: {in_one_line(error, 200)}; where it is damaged, put it back as it was, or move it away: "
        "runs that are finished stay as they are, others and the agents' memory begin anew"
    )


def _connect(file: Path, **options: Any) -> sqlite3.Connection:
    # LangGraph calls savers and stores from worker threads and guards them with its own lock.
    return sqlite3.connect(file, timeout=BUSY_SECONDS, check_same_thread=False, factory=_Connection, **options)
