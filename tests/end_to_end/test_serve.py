"""A run with its live page: what a reader sees while it goes on."""

import builtins
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from graph.show.live import listen
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import read_events, wait_for

pytestmark = pytest.mark.figures


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_a_run_is_shown_while_it_goes_on_and_nothing_listens_after(
    flags: list[str], tmp_path: Path, command: Command
) -> None:
    url, pages = f"http://127.0.0.1:{(port := find_port())}/", list[str]()

    def read() -> None:
        with httpx.Client(trust_env=False, timeout=60) as client, suppress(httpx.TransportError):
            wait_for(lambda: reaches(client, url))
            while True:
                pages.append(client.get(url).text)

    reader = threading.Thread(target=read)
    reader.start()
    outcome = command(*flags, "--serve", str(port))
    reader.join(60)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[0] == f"live page: {url}"
    assert len(set(pages)) > 1, "the page changed while it was looked at"
    assert read_events(tmp_path / "runs" / "run", "result")
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def reaches(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_that_is_taken_is_told_before_the_run_starts(flags: list[str], tmp_path: Path, command: Command) -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        outcome = command(*flags, "--serve", str(port))
    assert (outcome.code, outcome.out) == (2, "")
    said = f"error: --serve cannot listen at port {port}: Address already in use; give another, or 0 for any\n"
    assert outcome.err == said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", ["http", "65536", "-1", "8.0"])
def test_a_port_that_is_none(port: str, flags: list[str], tmp_path: Path, command: Command) -> None:
    outcome = command(*flags, f"--serve={port}")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: argument --serve: {port!r} is not a port, a number from 0 to 65535\n"
    assert list(tmp_path.iterdir()) == []


def test_without_its_packages_one_line_says_what_to_install(
    flags: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name == "graph.show.live":
            raise ImportError("No module named 'starlette'")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    outcome = command(*flags, "--serve")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "error: the packages for --serve are not installed; install them with: pip install -e '.[serve]'\n"
    )
    assert list(tmp_path.iterdir()) == []
