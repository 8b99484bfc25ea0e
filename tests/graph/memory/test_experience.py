"""What levers did in earlier runs: kept once, averaged when read, relatives named, the oldest forgotten."""

import pytest
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore

from graph.config import RunConfig
from graph.memory import experience as memory
from graph.memory.experience import read_experience, write_tried
from graph.memory.lessons import EXPERIENCE, namespace
from graph.planning.past import describe_experience
from graph.reflecting.schema import Tried
from tools.base.errors import UserError

CONFIG = RunConfig(model="Qwen/Qwen3-4B")
LARGE = RunConfig(model="Qwen/Qwen3-8B")
CLIPPED = "refit: gamma clipped for plain"


def tried(run: str, change: float = -0.02, iteration: int = 2, levers: str = CLIPPED, pattern: str = "") -> Tried:
    place = {"run": run, "iteration": iteration, "levers": levers, "pattern": pattern}
    return Tried(**place, sparsity=0.4497, change=change, error=0.01)  # type: ignore[arg-type]


@pytest.fixture
def store() -> BaseStore:
    return InMemoryStore()


def test_trials_with_the_same_levers_are_one_row(store: BaseStore) -> None:
    for _ in range(2):  # after a crash
        for run, change in (("a", -0.02), ("b", 0.04), ("own", 9.0)):
            write_tried(store, CONFIG, tried(run, change))
        write_tried(store, CONFIG, tried("a", -0.03, 3, "refit: with *.v_proj x2"))
        write_tried(store, CONFIG, tried("c", pattern="2:4"))
    clipped, tilted = read_experience(store, CONFIG, "own")
    assert (clipped.levers, clipped.sparsity, clipped.trials, clipped.runs) == (CLIPPED, 0.45, 2, 2)
    assert clipped.change == pytest.approx(0.01)
    assert clipped.error == pytest.approx(0.03), "they lie further apart than their errors say"
    assert (tilted.levers, tilted.error, tilted.trials, tilted.runs) == ("refit: with *.v_proj x2", 0.01, 1, 1)
    assert [row.trials for row in read_experience(store, CONFIG.model_copy(update={"pattern": "2:4"}), "own")] == [1]


def test_a_run_that_is_made_again_says_nothing_new(store: BaseStore) -> None:
    for run in "abcdefghi":
        write_tried(store, CONFIG, tried(run))
    (row,) = read_experience(store, CONFIG, "own")
    assert (row.change, row.error, row.trials, row.runs) == (-0.02, 0.01, 1, 1)


def test_relatives_come_last_with_their_names(store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tried(store, LARGE, tried("large"))
    write_tried(store, LARGE, tried("larger", iteration=3))
    write_tried(store, RunConfig(model="gpt2"), tried("far"))
    write_tried(store, CONFIG, tried("own", -0.031))
    text = describe_experience(read_experience(store, CONFIG, "new"))
    assert text.split("\n")[1:] == [
        "<data experience>",
        *("this model, 45%", f"{CLIPPED} -3.1 +- 1.0 (1, 1)"),
        *("relative Qwen/Qwen3-8B, 45%", f"{CLIPPED} -2.0 +- 0.7 (2, 2)"),
        "</data>",
    ]
    monkeypatch.setattr(memory, "ROWS", 1)
    assert [row.model for row in read_experience(store, CONFIG, "new")] == [""]
    assert describe_experience([]) == ""


def test_the_latest_are_kept_and_damage_is_told(store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT", 2)
    for iteration in (2, 3, 4):
        write_tried(store, CONFIG, tried("a", iteration=iteration))
    place = namespace(CONFIG.model, EXPERIENCE)
    assert sorted(item.key for item in store.search(place)) == ["a/3", "a/4"]
    item = store.get(place, "a/3")
    assert item is not None
    store.put(place, "a/3", {"change": -0.5})
    with pytest.raises(UserError, match=r"memory is damaged .*is not of this version"):
        read_experience(store, CONFIG, "new")
