"""Work that is done once: saved before the next begins, not done again, and not left behind by a node that leaves."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel

from graph.persistence import checkpointer, open_saver
from graph.persistence.serializer import _expected, _saved
from graph.persistence.sqlite import database
from graph.runs.session import do_once
from tests.end_to_end.helpers import wait_for
from tools.base.progress import Stopped, stop_at

Node = Callable[["Count"], dict[str, Any]]
THREAD: Any = {"configurable": {"thread_id": "thread"}}


class Count(BaseModel):
    count: int = 0


class Given(BaseModel):
    text: str


def wire(node: Any) -> StateGraph[Count, None, Count, Count]:
    graph = StateGraph(Count)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    graph.add_edge("node", END)
    return graph


def run(node: Node, runs_dir: Path, given: Count | None = None) -> dict[str, Any]:
    with open_saver(runs_dir) as saver:
        result: dict[str, Any] = wire(node).compile(checkpointer=saver).invoke(given, THREAD, durability="sync")
    return result


def read_saved(runs_dir: Path) -> int:
    """Tasks of which anything is saved; writes of channels go by other names."""
    with sqlite3.connect(database(runs_dir)) as connection:
        return len(connection.execute("SELECT * FROM writes WHERE channel = '__return__'").fetchall())


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    put = SqliteSaver.put_writes

    def put_slowly(*arguments: Any, **options: Any) -> None:
        time.sleep(0.05)
        put(*arguments, **options)

    monkeypatch.setattr(SqliteSaver, "put_writes", put_slowly)


def test_outside_of_a_graph_work_is_done() -> None:
    given = Given(text="x")
    assert do_once("work", lambda: given, Given) is given


def test_a_task_is_saved_before_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch)
    saved = []

    def node(state: Count) -> dict[str, Any]:
        for _ in range(3):
            do_once("work", lambda: Given(text=str(saved.append(read_saved(tmp_path)))), Given)
        return {"count": len(saved)}

    assert run(node, tmp_path, Count()) == {"count": 3}
    assert saved == [0, 1, 2]
    assert not _expected and not _saved


def test_nothing_is_waited_for_where_all_is_saved_at_the_end(tmp_path: Path) -> None:
    def node(state: Count) -> dict[str, Any]:
        return {"count": len(do_once("work", lambda: Given(text=str(read_saved(tmp_path))), Given).text)}

    with open_saver(tmp_path) as saver:
        app = wire(node).compile(checkpointer=saver)
        assert app.invoke(Count(), THREAD, durability="exit") == {"count": 1}


def test_what_is_done_is_not_done_again_and_what_fails_is(tmp_path: Path) -> None:
    done: list[str] = []

    def node(state: Count) -> dict[str, Any]:
        def work(name: str, times: int) -> Given:
            done.append(name)
            if done.count(name) < times:
                raise ValueError(f"{name} fails")
            return Given(text=name)

        given = [do_once("work", lambda pair=pair: work(*pair), Given) for pair in (("a", 1), ("b", 2), ("c", 3))]  # type: ignore[misc]
        return {"count": len({one.text for one in given})}

    with pytest.raises(ValueError, match=r"^b fails"):
        run(node, tmp_path, Count())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^c fails"):
            run(node, tmp_path)
    assert run(node, tmp_path) == {"count": 3}
    assert done == ["a", "b", "b", "c", "c", "c"]


def test_what_cannot_be_saved_ends_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def node(state: Count) -> dict[str, Any]:
        for name in "ab":
            do_once("work", lambda name=name: done.append(name) or Given(text=name), Given)  # type: ignore[misc]
        return {}

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(SqliteSaver, "put_writes", refuse)
    with pytest.raises(sqlite3.OperationalError, match=r"^database or disk is full"):
        run(node, tmp_path, Count())
    assert done == ["a"]


def test_a_stop_ends_the_node_before_its_next_task(tmp_path: Path) -> None:
    stop, done = threading.Event(), list[str]()

    def node(state: Count) -> dict[str, Any]:
        for name in "ab":
            do_once("work", lambda name=name: stop.set() or done.append(name) or Given(text=name), Given)  # type: ignore[misc]
        return {"count": 2}

    with stop_at(stop), pytest.raises(Stopped):
        run(node, tmp_path, Count())
    assert done == ["a"]
    stop.clear()
    assert run(node, tmp_path) == {"count": 2}
    assert done == ["a", "b"]


def test_a_cancelled_node_of_a_server_waits_for_the_task_that_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BILLHOOK_RUNS_DIR", str(tmp_path))
    cancelled, begun, go_on, left = (threading.Event() for _ in range(4))
    done: list[str] = []

    def work(name: str) -> Given:
        done.append(name)
        if done == ["a", "b"]:
            begun.set()
            assert go_on.wait(10)
            assert not left.is_set()
        return Given(text=name)

    def node(state: Count) -> dict[str, Any]:
        try:
            with stop_at(cancelled):
                given = [do_once("work", lambda name=name: work(name), Given) for name in "abc"]  # type: ignore[misc]
            return {"count": len(given)}
        finally:
            left.set()

    async def serve(state: Count) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(node, state)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def cancel_and_resume() -> Any:
        async with checkpointer() as saver:
            app = wire(serve).compile(checkpointer=saver)
            running = asyncio.create_task(app.ainvoke(Count(), THREAD))
            await asyncio.to_thread(wait_for, begun.is_set)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert not left.is_set()
            go_on.set()
            await asyncio.to_thread(wait_for, left.is_set)
            cancelled.clear()
            return await app.ainvoke(None, THREAD)

    assert asyncio.run(cancel_and_resume()) == {"count": 3}
    assert done == ["a", "b", "b", "c"]
