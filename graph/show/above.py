"""What others print while the live picture stands appears above it, as it is."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from tools.base.words import strip_controls


class LinesAbove(io.TextIOBase):
    """A stream that prints whole lines above the picture.

    rich's own proxy reads markup in what is flushed and prints every step of a tqdm bar as a line.
    """

    def __init__(self, console: Console, stream: TextIO) -> None:
        self.console = console
        self.rich_proxied_file = stream  # rich's name for it: consoles write to the stream itself
        self.rest = ""

    def write(self, text: str) -> int:
        """Print the lines that are whole; of a line that was written over only its last state."""
        *lines, self.rest = (self.rest + text).split("\n")
        self.rest = self.rest[self.rest.rfind("\r", 0, -1) + 1 :][-10_000:]
        for line in lines:
            self.console.print(Text(strip_controls(line.rstrip("\r").rpartition("\r")[2])))
        return len(text)

    def finish(self) -> None:
        """Print what was left without an end of line."""
        if self.rest:
            self.write("\n")

    def isatty(self) -> bool:
        """Say what the stream itself would say."""
        return self.rich_proxied_file.isatty()

    def fileno(self) -> int:
        """The stream's own, for processes that are started meanwhile."""
        return self.rich_proxied_file.fileno()


@contextmanager
def print_above(console: Console) -> Iterator[None]:
    """Have all that is written to the terminal meanwhile appear above the picture, log handlers included."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    above = {name: LinesAbove(console, stream) for name, stream in streams.items() if stream and stream.isatty()}
    handlers = []
    for handler in find_handlers():
        for name, proxy in above.items():
            if handler.stream is streams[name]:
                handlers.append((handler, streams[name]))
                handler.setStream(proxy)
    for name, proxy in above.items():
        setattr(sys, name, proxy)
    try:
        yield
    finally:
        for name, proxy in above.items():
            if getattr(sys, name) is proxy:
                setattr(sys, name, streams[name])
            proxy.finish()
        for handler, stream in handlers:
            handler.setStream(stream)


def find_handlers() -> list[logging.StreamHandler[Any]]:
    """All log handlers that write to a stream: they hold on to the stream they were made with."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {id(h): h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    # logging's own last resort looks sys.stderr up each time, and its stream cannot be set.
    return [h for h in handlers.values() if isinstance(h, logging.StreamHandler) and "stream" in vars(h)]
