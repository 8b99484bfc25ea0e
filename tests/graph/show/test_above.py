"""What others print appears above the picture."""

import io
import logging
import re
import sys

import pytest

from graph.show.display import open_display
from tests.graph.show.shown import (
    Terminal,
    make_console,
)


def test_logs_and_prints_appear_above_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    logger = logging.getLogger("billhook.test")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(err)])
    console = make_console()
    with open_display(console, name="demo", target=0.45):
        logger.warning("[/nope] careful")
        print("    indented \x1b[31mred")
        sys.stderr.write("\r 10%|#")
        sys.stderr.flush()
        sys.stderr.write("\r100%|##########\n")
        sys.stderr.write("no end of line [/]")
        sys.stderr.flush()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    lines = [re.sub(r"\x1b\[\??\d+[a-zA-Z]|\r", "", line) for line in lines]
    assert "[/nope] careful" in lines
    assert "    indented red" in lines
    assert "100%|##########" in lines
    assert not [line for line in lines if " 10%" in line]
    assert "no end of line [/]" in lines
    assert out.getvalue() == err.getvalue() == ""


def test_streams_that_are_no_terminal_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with open_display(make_console(), name="demo", target=0.45):
        print("for the pipe")
    assert pipe.getvalue() == "for the pipe\n"
