"""A real PostgreSQL server for tests, started from the system's binaries in a directory of its own."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "pl0ugh-share/7'b"
"""Holds what a URL must escape."""
ESCAPED = "pl0ugh-share%2F7%27b"


@dataclass
class PostgresServer:
    """A server on this machine, with a database and a user `billhook`."""

    directory: Path
    bin: Path
    port: int
    user: dict[str, Any]
    """As whom its programs run, for `subprocess`."""

    @property
    def url(self) -> str:
        """What `--state` takes."""
        return f"postgresql://billhook:{ESCAPED}@127.0.0.1:{self.port}/billhook"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -h 127.0.0.1 -k {self.directory} -c fsync=off"
        self._control("start", "-w", "-l", str(self.directory / "log"), "-o", options)

    def stop(self) -> None:
        """Stop it at once, as a crash would: what was committed stays."""
        self._control("stop", "-m", "immediate")

    def make_database(self, name: str) -> str:
        """Another, empty database; its URL."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url.removesuffix("billhook") + name

    def dump(self, url: str) -> str:
        """All that a database holds, as SQL."""
        return self._run("pg_dump", "--inserts", url)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self.directory / "data"), *arguments)

    def _run(self, program: str, *arguments: str) -> str:
        with (self.directory / "out").open("w+") as out:  # a pipe would be held open by the server that pg_ctl leaves
            subprocess.run(
                [str(self.bin / program), *arguments],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=True,
                **self.user,
            )
            out.seek(0)
            return out.read()


def find_binaries() -> Path | None:
    """Where initdb and its kin lie: Debian keeps them out of PATH."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if path := shutil.which("initdb"):
        places.insert(0, Path(path).resolve().parent)
    return next((place for place in places if (place / "initdb").is_file()), None)


@contextlib.contextmanager
def serve_postgres() -> Iterator[PostgresServer]:
    """A running server; it and its files are gone afterwards. Skips the test where there are no binaries."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    directory = Path(tempfile.mkdtemp(prefix="billhook-postgres-"))  # pytest's own directories are closed to others
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = PostgresServer(directory, binaries, free.getsockname()[1], user)
    try:
        secret = directory / "password"
        secret.write_text(PASSWORD)
        options = ("--username", "billhook", "--auth", "scram-sha-256", "--pwfile", str(secret), "--no-sync")
        server._run("initdb", "-D", str(directory / "data"), "-E", "UTF8", "--locale", "C", *options)
        server.start()
        try:
            import psycopg

            with psycopg.connect(f"{server.url.removesuffix('billhook')}postgres", autocommit=True) as connection:
                connection.execute("CREATE DATABASE billhook")
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):  # a test may have stopped it
                server.stop()
    finally:
        shutil.rmtree(directory)
