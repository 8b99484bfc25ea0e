"""A page that tries to start runs on a server of this machine, in every way that a page can send something.

`visit_with_pages` opens it in a real browser: from another port, by a foreign name, and as Studio's page.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from langgraph_sdk.client import SyncLangGraphClient

from graph.doors import FOREIGN_HOST, STUDIO
from tests.chromium import FOREIGN, open_browser

SCRIPT = """
const server = SERVER, run = name => JSON.stringify({...RUN, input: {run: name}});
const json = {"Content-Type": "application/json", "X-Api-Key": "x"}, text = {"Content-Type": "text/plain"};
const ask = async (path, options) => {
  try {
    const answer = await fetch(server + path, options);
    await answer.text();
    return answer.status;
  } catch (error) {
    return "refused";
  }
};
const call = () => new Promise(done => {
  const socket = new WebSocket(server.replace("http", "ws") + "/threads/THREAD/stream/events");
  socket.onopen = () => { socket.close(); done("open"); };
  socket.onerror = () => done("refused");
});
const openly = async () => ({
  "a run": await ask("/runs/wait", {method: "POST", headers: json, body: run("openly")}),
  "a thread, as text": await ask("/threads", {method: "POST", headers: text, body: "{}"}),
  "a look": await ask("/info", {}),
  "a socket": await call(),
});
const submit = name => new Promise(done => {
  const add = (parent, tag, options) => parent.appendChild(Object.assign(document.createElement(tag), options));
  const frame = add(document.body, "iframe", {name: "answer"});
  const form = add(document.body, "form", {action: server + "/runs/wait", method: "POST", target: "answer"});
  form.enctype = "text/plain";  // what is sent is NAME=VALUE, and the = is put into a string
  add(form, "input", {name: run(name).slice(0, -1) + ', "metadata": {"equals": "', value: '"}}'});
  frame.onload = () => done("sent");
  form.submit();
});
const blindly = async () => ({
  "a run, as text": await ask("/runs/wait", {method: "POST", mode: "no-cors", headers: text, body: run("text")}),
  "a run, by a beacon": navigator.sendBeacon(server + "/runs", run("beacon")),
  "a run, by a form": await submit("form"),
});
"""
REFUSED = dict.fromkeys(("a run", "a thread, as text", "a look", "a socket"), "refused")
SENT_BLINDLY = {"a run, as text": 0, "a run, by a beacon": True, "a run, by a form": "sent"}
"""As much as a browser tells a page."""
TAKEN = {"a run": 200, "a thread, as text": 200, "a look": 200, "a socket": "open"}


def visit_with_pages(directory: Path, client: SyncLangGraphClient, port: int, runs: Path, context: Any) -> None:
    """Open the page where it is foreign, which starts nothing, and as Studio's, whose run is made.

    The browser keeps its files in `directory`, which must be new. `context` is that of the runs.
    """
    thread, server = client.threads.create()["thread_id"], f"http://127.0.0.1:{port}"

    def look() -> tuple[set[str], set[str]]:
        threads = client.threads.search(limit=1000)
        return {thread["thread_id"] for thread in threads}, {path.name for path in runs.glob("*/")}

    page, before = write_page(server, thread, context), look()
    with open_browser(directory) as browser, serve_page(page) as elsewhere:
        for name in ("127.0.0.1", FOREIGN):
            browser.open(f"http://{name}:{elsewhere}/")
            assert browser.evaluate("openly()") == REFUSED
            assert browser.evaluate("blindly()") == SENT_BLINDLY
        browser.open(f"http://{FOREIGN}:{port}/info")
        assert browser.evaluate("document.body.textContent") == f"{FOREIGN_HOST}\n"
        rebound = "fetch('/threads', {method: 'POST', body: '{}'}).then(answer => answer.status)"
        assert browser.evaluate(rebound) == 400
        assert look() == before
        browser.stand_in(STUDIO, page)
        browser.open(f"{STUDIO}/studio/?baseUrl={server}")
        assert browser.evaluate("origin") == STUDIO
        assert browser.evaluate("openly()") == TAKEN, browser.complaints()
    assert len(look()[0] - before[0]) == 2


def write_page(server: str, thread: str, context: Any) -> str:
    """The page, for a server at an address and one of its threads."""
    run = {"assistant_id": "billhook", "context": context, "on_completion": "keep"}
    script = SCRIPT.replace("SERVER", json.dumps(server)).replace("RUN", json.dumps(run)).replace("THREAD", thread)
    return f"<!DOCTYPE html><title>Harmless</title><body><script>{script}</script></body>"


@contextlib.contextmanager
def serve_page(page: str) -> Iterator[int]:
    """Serve a page at a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
