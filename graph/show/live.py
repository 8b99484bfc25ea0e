"""The report of a run while it goes on, for this machine alone: `python -m graph.run --serve [PORT]`.

A page that loads itself again every few seconds, made from the run's directory. It ends with the run's process.
"""

import html
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from graph.doors import Doors
from tools.base.errors import UserError
from tools.results.page.page import write_page

HOST = "127.0.0.1"
RELOAD_SECONDS = 5
CLOSE_SECONDS = 5
"""How long the end of the run waits for a page that is being drawn."""

HEADERS = {
    "Cache-Control": "no-store",
    "Refresh": str(RELOAD_SECONDS),
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""No text of a model can run anything."""


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


def make_app(directory: Path) -> Starlette:
    """One address that can be read: the report of what is in the directory."""

    def page(_: Request) -> Response:
        try:
            text = write_page([directory])
        except UserError as error:  # before there is anything to report
            text = f"<!DOCTYPE html><title>Billhook</title><body><p>{html.escape(str(error))}</p></body>"
        return HTMLResponse(text, headers=HEADERS)

    return Starlette(routes=[Route("/", page)], middleware=[Middleware(Doors)])


@contextmanager
def serve(directory: Path, listener: socket.socket) -> Iterator[None]:
    """Serve the page of a run's directory meanwhile."""
    config = uvicorn.Config(
        make_app(directory),
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
        yield
    finally:
        server.should_exit = True
        thread.join(CLOSE_SECONDS + 1)
