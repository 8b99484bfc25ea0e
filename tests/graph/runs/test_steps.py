"""How long a server keeps the model: from node to node, not when none will follow."""

import threading

import pytest

from graph.runs import steps
from graph.runs.steps import Keeper
from tests.end_to_end.helpers import wait_for


@pytest.fixture
def let_go_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time the model was let go of."""
    times: list[str] = []
    monkeypatch.setattr(steps, "let_go", lambda: times.append(threading.current_thread().name))
    return times


def test_the_model_is_kept_until_the_next_node_begins(let_go_of: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "IDLE_SECONDS", 0.05)
    keeper = Keeper()
    keeper.begin()
    keeper.end(keep=True)
    wait = keeper._timer
    assert wait is not None
    keeper.begin()
    wait.join()
    assert let_go_of == [], "a node is at work"
    keeper.end(keep=True)
    wait_for(lambda: let_go_of)
    assert let_go_of != [threading.current_thread().name], "nobody has to ask for it"


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
