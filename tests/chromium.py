"""A headless Chromium for tests: opens a page, tells what went wrong in it and what it asked for, takes pictures."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

COMMAND = shutil.which("chromium")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--mute-audio"),
    *("--remote-debugging-port=0", "--hide-scrollbars", "--no-proxy-server"),
    # Newer versions ask a person before a page of the internet may speak to this machine; older ones do not.
    "--disable-features=LocalNetworkAccessChecks",
)
FOREIGN = "evil.example"
"""A name that the browser finds on this machine, as if its owner had pointed it here."""


class Page:
    """A tab, through the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self._stand_in = ""
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command; its result. Events that come before it are kept."""
        number = self._tell(method, parameters)
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def _tell(self, method: str, parameters: dict[str, Any]) -> int:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        return number

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(timeout=60))
        if message.get("method") == "Fetch.requestPaused":
            page = base64.b64encode(self._stand_in.encode()).decode()
            answer = {"requestId": message["params"]["requestId"], "responseCode": 200, "body": page}
            self._tell("Fetch.fulfillRequest", answer)
        return message

    def stand_in(self, origin: str, page: str) -> None:
        """Answer every request to an origin with a page, which then is of that origin; its site is not asked."""
        self._stand_in = page
        self.send("Fetch.enable", patterns=[{"urlPattern": f"{origin}/*"}])

    def open(self, address: str) -> None:
        """Go to an address and wait until all of it is loaded."""
        self.events.clear()
        self.send("Page.navigate", url=address)
        while not self.pick("Page.loadEventFired"):
            self.events.append(self._receive())
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def pick(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of the events of these kinds since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened."""
        return [event["request"]["url"] for event in self.pick("Network.requestWillBeSent")]

    def complaints(self) -> list[dict[str, Any]]:
        """What the console says, and exceptions."""
        return self.pick("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")

    def evaluate(self, script: str) -> Any:
        """The value of JavaScript, promises awaited."""
        told = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def look(self, width: int, theme: str = "light", height: int = 800, scale: float = 1) -> None:
        """Be a screen `width` pixels wide, in the light or the dark theme."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def shoot(self, path: Path) -> Path:
        """A picture of the whole page, as PNG."""
        told = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))
        return path


@contextmanager
def open_browser(directory: Path) -> Iterator[Page]:
    """A browser with one empty tab; what it keeps goes into `directory`, which must be new."""
    assert COMMAND, "chromium is not installed"
    here = f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"
    command = [COMMAND, *_FLAGS, here, f"--user-data-dir={directory}", "about:blank"]
    environment = os.environ | {"HOME": str(directory)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        port = _wait_for_port(directory / "DevToolsActivePort", process)
        with httpx.Client(trust_env=False, timeout=60) as client:
            tabs = client.get(f"http://127.0.0.1:{port}/json/list").json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_port(file: Path, process: "subprocess.Popen[bytes]") -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, "chromium ended at once"
        lines = file.read_text().splitlines() if file.is_file() else []
        if len(lines) > 1:
            return int(lines[0])
        time.sleep(0.02)
    raise AssertionError("chromium does not start")
