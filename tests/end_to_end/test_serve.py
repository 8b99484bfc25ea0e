"""A run with its live page: what a reader sees while it goes on and at its end, in plain HTTP and in a browser."""

import builtins
import json
import re
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from graph.show.live import address, listen, make_page, serve
from tests.chromium import COMMAND, open_browser
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import read_events, wait_for
from tests.graph.show.test_live import Terminal, read_told
from tools.base.rundir import LAST, append_event

pytestmark = pytest.mark.figures


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Reader(threading.Thread):
    """Reads a page's events from the moment that it can be reached until they end."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.url = f"http://127.0.0.1:{port}"
        self.events: list[dict[str, str]] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=60) as client:
            wait_for(lambda: self.reaches(client))
            with client.stream("GET", "/events") as answer:
                self.events.extend(read_told(answer))

    def reaches(self, client: httpx.Client) -> bool:
        try:
            return client.get("/").status_code == 200
        except httpx.TransportError:
            return False

    def pick(self, type_: str) -> list[str]:
        return [json.loads(event["data"]) for event in self.events if event["event"] == type_]


def test_a_run_is_shown_while_it_goes_on_and_nothing_listens_after(
    flags: list[str], tmp_path: Path, command: Command
) -> None:
    reader = Reader(port := find_port())
    reader.start()
    outcome = command(*flags, "--serve", str(port))
    reader.join(60)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[0] == f"live page: http://127.0.0.1:{port}/"
    pages = reader.pick("page")
    assert len(pages) > 1, "the page changed while it was looked at"
    report = (tmp_path / "runs" / "run" / "report.html").read_text(encoding="utf-8")
    (body,) = re.findall(r"<main>.*</main>", report, re.DOTALL)
    assert body in pages[-1] and body not in pages[0]
    assert reader.pick("line")[-1] == "The run's process has ended; this is how it stood."
    with pytest.raises(httpx.ConnectError):
        httpx.get(reader.url, trust_env=False)
    assert read_events(tmp_path / "runs" / "run", "result")


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


@pytest.mark.skipif(COMMAND is None, reason="chromium is not installed")
def test_a_browser_follows_a_run(easy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(easy, run, ignore=shutil.ignore_patterns("summary.json", "model", LAST))
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if '"type": "trial"' in line[:100] and '"iteration": 1' in line)
    (run / "events.jsonl").write_text("".join(lines[: first + 1]), encoding="utf-8")
    with open_browser(tmp_path / "browser") as page, listen(0) as listener:
        with serve(run, listener, Terminal()) as board:
            page.open(address(listener))
            assert page.evaluate("document.querySelectorAll('details.trial').length") == 1
            page.evaluate("document.querySelector('details.trial').open = true; 0")
            warning = {"type": "warning", "text": "<img src=x onerror=alert(1)> <script>alert(2)</script>"}
            append_event(run, warning)
            board.show(warning)
            board.show({"type": "progress", "label": "validation", "done": 3, "total": 8})
            wait_for(lambda: page.evaluate("document.querySelectorAll('p.warning').length"))
            assert page.evaluate("document.querySelector('p.warning').textContent") == f"Warning: {warning['text']}"
            assert page.evaluate("document.querySelector('details.trial').open"), "what a reader opened stays open"
            wait_for(lambda: "validation: 3 of 8" in page.evaluate("document.getElementById('live').textContent"))
            text = page.evaluate("document.querySelector('main').textContent")
            page.open(address(listener))
            assert page.evaluate("document.querySelector('main').textContent") == text, "a reload shows the same"
            assert page.complaints() == []
            assert {url.partition("?")[0] for url in page.requests() if not url.startswith("data:")} == {
                *(address(listener), f"{address(listener)}events")
            }
        ended = "The run's process has ended"
        wait_for(lambda: page.evaluate("document.getElementById('live').textContent").startswith(ended))


def test_make_page_keeps_what_the_report_says(easy: Path) -> None:
    report = (easy / "report.html").read_text(encoding="utf-8")
    page = make_page(easy, "1-0", "")
    (body,) = re.findall(r"<main>.*</main>", report, re.DOTALL)
    assert body in page
