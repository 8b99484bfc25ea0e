"""A question is asked in plain lines, and in the picture's place."""

import io
from typing import Any

import pytest
from rich.console import Console

from graph.show.display import open_display
from tests.graph.show.shown import (
    PLAN,
    START,
    make_console,
)

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
    with open_display(console, name="demo", target=0.45, live=False) as display:
        assert display.ask(QUESTION) == "accept"
        with pytest.raises(EOFError):
            display.ask(QUESTION)
    assert console.file.getvalue().split("\n") == [*ASKED[:-1], ASKED[-1] + ASKED[0], *ASKED[1:]]  # type: ignore[attr-defined]


def test_a_question_takes_the_pictures_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("refuse no\n"))
    console = make_console()
    with open_display(console, name="demo", target=0.45, live=True) as display:
        display.show(START)
        assert display.ask(QUESTION) == "refuse no"
        display.show(PLAN)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(line in written for line in ASKED)
    after = written[written.index(ASKED[-1]) + len(ASKED[-1]) :]
    assert "45.0% two-sided+refit:kappa" in after
    height = after[: after.index("Billhook")].count("\x1b[1A")
    assert height == 0, "the picture that is drawn again erases nothing of the question"
