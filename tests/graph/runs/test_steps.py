"""How long a server keeps the model: from node to node, not when none will follow."""

import threading

import pytest

from graph.runs import steps
from graph.runs.steps import Keeper


@pytest.fixture
def let_go_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time the model was let go of."""
    times: list[str] = []
    monkeypatch.setattr(steps, "let_go", lambda: times.append(threading.current_thread().name))
    return times


def test_it_is_let_go_of_at_once_when_no_node_is_to_follow(let_go_of: list[str]) -> None:
    keeper = Keeper()
    keeper.begin()
    keeper.end(keep=False)
    assert let_go_of == [threading.current_thread().name]


def test_it_is_not_taken_from_a_node_of_another_run(let_go_of: list[str]) -> None:
    keeper = Keeper()
    keeper.begin()
    keeper.begin()
    keeper.end(keep=False)
    assert let_go_of == []
    keeper.end(keep=False)
    assert len(let_go_of) == 1
