"""Plain lines, exactly."""

import io

from rich.console import Console

from tests.graph.show.shown import (
    PLAIN,
    RUN,
    make_console,
    make_trial,
    show_plain,
)


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
