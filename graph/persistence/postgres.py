"""Checkpoints and memory in PostgreSQL (the extra `[postgres]`), for runs that several machines work on.

The URL may hold a password: nothing here repeats it, and no message of libpq's that could quote it is passed on.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.store.postgres import PostgresStore
from langgraph.store.postgres.aio import AsyncPostgresStore
from psycopg import Error as Error
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from graph.persistence.serializer import TellingSaver
from tools.base.errors import UserError

FORM = "postgresql://HOST:PORT/DATABASE, with USER:PASSWORD@ before the host; write / @ : in a password as %2F %40 %3A"
CONNECT_SECONDS = 10
BUSY_SECONDS = 60.0
"""How long to wait for another process that makes the tables, and for a server that was restarted meanwhile."""

MAKING_TABLES = 0x62696C6C
"""Key of the advisory lock under which tables are made: the migrations fail when two processes run them at once."""

OPTIONS: dict[str, Any] = {
    "autocommit": True,
    "prepare_threshold": 0,
    "row_factory": dict_row,
    "connect_timeout": CONNECT_SECONDS,
}
POOL: dict[str, Any] = {"min_size": 1, "max_size": 4, "timeout": BUSY_SECONDS}

logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # each attempt to reconnect; the last one's error is told


class _Saver(TellingSaver, PostgresSaver):
    pass


class _AsyncSaver(TellingSaver, AsyncPostgresSaver):
    pass


@contextmanager
def open_saver(url: str, serde: SerializerProtocol) -> Iterator[PostgresSaver]:
    """The checkpoints of all runs in the database; UserError when it cannot be reached or written."""
    create_tables(url)
    with _open_pool(url) as pool:
        yield _Saver(pool, serde=serde)


@contextmanager
def open_store(url: str) -> Iterator[PostgresStore]:
    """The memory of all runs in the database; UserError when it cannot be reached or written."""
    create_tables(url)
    with _open_pool(url) as pool:
        yield PostgresStore(pool)


@asynccontextmanager
async def checkpointer(url: str, serde: SerializerProtocol) -> AsyncIterator[AsyncPostgresSaver]:
    """What `langgraph dev` checkpoints with; UserError as in `open_saver`."""
    async with _open_async_pool(url) as pool:
        yield _AsyncSaver(pool, serde=serde)


@asynccontextmanager
async def store(url: str) -> AsyncIterator[AsyncPostgresStore]:
    """What `langgraph dev` remembers with; UserError as in `open_store`."""
    async with _open_async_pool(url) as pool, AsyncPostgresStore(pool) as memory:
        yield memory


def _open_pool(url: str) -> ConnectionPool[psycopg.Connection[DictRow]]:
    """Connections that are tried before they are used: a run outlives a restart of the server."""
    return ConnectionPool(
        url,
        connection_class=psycopg.Connection[DictRow],
        check=ConnectionPool.check_connection,
        kwargs=OPTIONS,
        open=True,
        **POOL,
    )


@asynccontextmanager
async def _open_async_pool(url: str) -> AsyncIterator[AsyncConnectionPool[psycopg.AsyncConnection[DictRow]]]:
    await asyncio.to_thread(create_tables, url)  # the server forbids blocking calls on its loop
    async with AsyncConnectionPool(
        url,
        connection_class=psycopg.AsyncConnection[DictRow],
        check=AsyncConnectionPool.check_connection,
        kwargs=OPTIONS,
        open=False,
        **POOL,
    ) as pool:
        yield pool


def create_tables(url: str) -> None:
    """Make the tables where there are none; UserError with one line when that cannot be done."""
    password = _read_password(url)
    try:
        with psycopg.Connection.connect(url, **OPTIONS) as connection:
            _wait_for_lock(connection)
            PostgresSaver(connection).setup()
            PostgresStore(connection).setup()
    except psycopg.Error as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"the PostgreSQL database cannot be used: {message.replace(password, '[key]') if password else message}"
        ) from None


def _read_password(url: str) -> str:
    """The URL's password, or "". Raises UserError, without a word of the URL's, when it cannot be read as one."""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        parts = {"host": "@"}
    # A password with a bare / or @ puts pieces of itself where messages quote them.
    if "@" in str(parts.get("host") or "") or not re.fullmatch(r"[\d,]*", str(parts.get("port") or "")):
        raise UserError(f"the state's address is not of the form {FORM}")
    return str(parts.get("password") or "")


def _wait_for_lock(connection: psycopg.Connection[DictRow]) -> None:
    """Take the lock, which the server frees with the connection.

    By asking again and again: a statement that waits for it would be waited for by the CREATE INDEX CONCURRENTLY of
    whoever holds it.
    """
    end = time.monotonic() + BUSY_SECONDS
    while True:
        row = connection.execute("SELECT pg_try_advisory_lock(%s) AS taken", (MAKING_TABLES,)).fetchone()
        if row is not None and row["taken"]:
            return
        if time.monotonic() > end:
            raise UserError(f"another process has been making the state's tables for {BUSY_SECONDS:.0f} s")
        time.sleep(0.05)
