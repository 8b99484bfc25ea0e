"""The report of a run, live on this machine while the run goes on: `python -m graph.run --serve [PORT]`.

All that it shows comes from the run's directory, so that a reload shows everything so far. It can be read by this
machine alone, and there is nothing to write. The server ends with the run's process.
"""

import asyncio
import base64
import hashlib
import html
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from graph.doors import Doors
from graph.show.display import Display
from graph.show.words import UNEXPECTED, Event
from tools.base.errors import UserError
from tools.base.words import clean
from tools.results.page.page import write_page

HOST = "127.0.0.1"
LOOK_SECONDS = 0.25
"""How often a reader is told what changed: the run has better things to do."""
CLOSE_SECONDS = 5
"""How long the end of the run waits for the last page to be drawn and read."""

REDRAWN = {
    *("start", "profile", "brief", "plan", "approval", "trial", "rollback", "accept", "layers", "reply", "tool"),
    *("lesson", "note", "warning", "parting", "result", "stopped"),
}
"""Events that the report shows."""

BAR = (
    '<output id="live" data-page="{page}" style="position: fixed; inset: auto 0 0 0; padding: .5rem 1rem; '
    "background: var(--card, Canvas); color: var(--ink, CanvasText); border-top: 1px solid var(--rule, CanvasText); "
    'font-size: .9rem">{line}</output>'
)
SCRIPT = """
const live = () => document.getElementById("live");
const source = new EventSource("/events?page=" + live().dataset.page);
source.addEventListener("page", event => {
  const fresh = new DOMParser().parseFromString(JSON.parse(event.data), "text/html");
  const open = [...document.querySelectorAll("details")].map(part => part.open);
  fresh.querySelectorAll("details").forEach((part, i) => { part.open = open[i] ?? part.open; });
  const place = scrollY;
  document.title = fresh.title;
  document.body.replaceWith(fresh.body);
  scrollTo(0, place);
});
source.addEventListener("line", event => { live().textContent = JSON.parse(event.data); });
source.addEventListener("error", () => { live().textContent = "The run's process has ended, or cannot be reached."; });
"""

_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{_HASH}'; connect-src 'self'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""No text of a model can run anything: only the one script may."""


def listen(port: int) -> socket.socket:
    """A socket of this machine's own, at a port or at any (0). Raises UserError where it is taken."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        problem = error.strerror or str(error)
        raise UserError(f"--serve cannot listen at port {port}: {problem}; give another, or 0 for any") from error
    return listener


def address(listener: socket.socket) -> str:
    """Where a browser finds the page."""
    return f"http://{HOST}:{listener.getsockname()[1]}/"


class Board:
    """What readers of the page are told; a display that stands beside the terminal's."""

    def __init__(self, directory: Path, display: Display) -> None:
        self.directory, self.display = directory, display
        self.line = ""
        """The step at work, and how far it is."""
        self.closing = False
        self._node = ""
        self._begun, self._changes = time.time_ns(), 0
        self._drawing = threading.Lock()
        self._drawn = ("", "")

    @property
    def page(self) -> str:
        """Id of the page as it would be drawn now; no other process uses it."""
        return f"{self._begun}-{self._changes}"

    def show(self, event: Event) -> None:
        """Show one event of the run, and let the readers know."""
        self.display.show(event)
        self._changes += event.get("type") in REDRAWN
        try:
            if event["type"] == "node":
                step = clean(event["node"], 40)
                self._node = f"iteration {event['iteration']}: {step}" if event.get("iteration") else step
                self.line = self._node
            elif event["type"] == "progress":
                done, total = int(event["done"]), int(event["total"])
                self.line = f"{self._node} · {clean(event['label'], 60)}: {done:,} of {total:,}"
        except UNEXPECTED:
            pass  # the display beside this one shows it as it is

    def ask(self, question: Event) -> str:
        """Let the other display ask: nobody answers through the page."""
        self.line = "A plan waits for a person, in the terminal."
        return self.display.ask(question)

    def draw(self) -> tuple[str, str]:
        """(id, HTML) of the present page, drawn once for all readers."""
        with self._drawing:
            page = self.page
            if self._drawn[0] != page:
                self._drawn = (page, make_page(self.directory, page, self.line))
            return self._drawn


def make_page(directory: Path, page: str, line: str) -> str:
    """The report with a line on what is going on, and the script that keeps both up to date."""
    try:
        text = write_page([directory])
    except UserError as error:
        text = f"<!DOCTYPE html><title>Billhook</title><body><p>{html.escape(str(error))}</p></body>"
    # Its own policy allows no script at all; the one in HEADERS allows exactly one.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n?', "", text, count=1)
    bar = BAR.format(page=page, line=html.escape(line))
    before, end, after = text.rpartition("</body>")
    return f"{before}{bar}<script>{SCRIPT}</script>{end}{after}"


def make_app(board: Board) -> Starlette:
    """Two addresses that can be read: the page, and the events that keep it up to date."""

    async def page(_: Request) -> Response:
        return HTMLResponse((await run_in_threadpool(board.draw))[1], headers=HEADERS)

    async def events(request: Request) -> Response:
        seen = request.headers.get("last-event-id") or request.query_params.get("page", "")
        return StreamingResponse(tell_changes(board, request, seen), media_type="text/event-stream", headers=HEADERS)

    routes = [Route("/", page), Route("/events", events)]
    for route in routes:
        route.methods = {"GET"}  # without HEAD, whose answer to /events would have no end
    return Starlette(routes=routes, middleware=[Middleware(Doors)])


async def tell_changes(board: Board, request: Request, seen: str) -> AsyncIterator[str]:
    """Server-sent events: the page where it is another than the one `seen`, and the line, until the board closes.

    A slow reader misses what was between: each gets what is true when it is told.
    """
    line = ""
    yield "retry: 1000\n\n"
    while not await request.is_disconnected():
        closing = board.closing  # before the rest is looked at, for nothing changes after it
        if board.page != seen:
            seen, text = await run_in_threadpool(board.draw)
            line = ""  # the new page has that of when it was drawn
            yield f"event: page\nid: {seen}\ndata: {json.dumps(text)}\n\n"
        if board.line != line:
            line = board.line
            yield f"event: line\ndata: {json.dumps(line)}\n\n"
        if closing:
            return
        await asyncio.sleep(LOOK_SECONDS)


@contextmanager
def serve(directory: Path, listener: socket.socket, display: Display) -> Iterator[Display]:
    """Serve the page of a run's directory; inside, what the display is shown the readers are told as well."""
    board = Board(directory, display)
    config = uvicorn.Config(
        make_app(board),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=partial(server.run, sockets=[listener]), name="page", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        board.line = "The run's process has ended; this is how it stood."
        board.closing = True
        server.should_exit = True
        thread.join(CLOSE_SECONDS + 1)
