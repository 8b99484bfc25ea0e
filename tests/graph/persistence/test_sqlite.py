"""The SQLite file: what is written comes back, without pickle, from two processes at once, and small."""

import asyncio
import os
import pickle
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import GetOp, PutOp

from graph import persistence
from graph.config import RunConfig
from graph.persistence import sqlite
from graph.planning.plan import Plan
from graph.reflecting.schema import Lesson
from graph.state import Input, State
from tests.graph.persistence.values import LESSON, TRIAL, VALUES
from tests.paths import IMPORTS, ROOT
from tools.base.errors import UserError
from tools.base.rundir import RUNS_DIR_VARIABLE
from tools.plans.recipe import MAX_ADJUSTMENTS, Adjustment, Recipe
from tools.results.schema import Usage

THREAD = {"configurable": {"thread_id": "7d9a3f1e-0000-4000-8000-000000000001"}}

# Run in another process; the first argument is the runs directory, the second a name.
WRITER = """
import sys
from pathlib import Path
from langgraph.store.base import GetOp, PutOp
from graph import persistence

with persistence.open_saver(Path(sys.argv[1])) as saver, persistence.open_store(Path(sys.argv[1])) as store:
    for i in range(60):
        checkpoint = {"v": 4, "id": f"{i:08}", "ts": ""}
        checkpoint |= {"channel_values": {}, "channel_versions": {}, "versions_seen": {}}
        saver.put({"configurable": {"thread_id": sys.argv[2], "checkpoint_ns": ""}}, checkpoint, {}, {})
        store.batch([GetOp(("notes",), "none"), PutOp(("notes",), f"{sys.argv[2]}-{i}", {"i": i})])
"""
READER = """
import sys
from pathlib import Path
from graph import persistence
from tests.graph.persistence.test_sqlite import THREAD, build
from tests.graph.persistence.values import VALUES

with persistence.open_saver(Path(sys.argv[1])) as saver:
    values = build().compile(checkpointer=saver).get_state(THREAD).values
assert values == VALUES, values
"""


def build() -> StateGraph:
    """A graph of one node, which writes every field of the state."""
    builder = StateGraph(State)
    builder.add_node("fill", lambda state: VALUES)
    builder.add_edge(START, "fill").add_edge("fill", END)
    return builder


def run_once(runs_dir: Path) -> None:
    with persistence.open_saver(runs_dir) as saver, persistence.open_store(runs_dir) as store:
        build().compile(checkpointer=saver, store=store).invoke({"run": "r"}, THREAD, durability="sync")
        store.put(("lessons", "tiny"), "1", LESSON.model_dump())


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": IMPORTS} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def test_run_reads_back_in_a_strict_process(tmp_path: Path) -> None:
    run_once(tmp_path)
    assert finish(start(READER, str(tmp_path), LANGGRAPH_STRICT_MSGPACK="true")) == ""


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "dumps", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    run_once(tmp_path)
    with closing(sqlite3.connect(sqlite.database(tmp_path))) as connection:
        rows = connection.execute("SELECT type FROM checkpoints UNION SELECT type FROM writes").fetchall()
    assert {kind for (kind,) in rows} == {"msgpack+crc", "msgpack+zlib", "null"}


ITERATIONS = 40
LONG = Plan(
    sparsity=0.45,
    adjustments=[
        Adjustment(selector=f"blocks {i}-{i + 1} · *.v_proj", action="factor", factor=1 + i / 64, reason="they hurt")
        for i in range(MAX_ADJUSTMENTS)
    ],
    reason="Lean away from what the last trial showed to be dearer than its curves said. " * 20,
    multipliers={f"blocks {i}-{i + 9} · mlp.down_proj": 1 + i / 100 for i in range(30)},
)


def fill_long_run(node: str, state: State) -> dict[str, Any]:
    """What a node of a long, wordy run leaves in the state; of layers there is nothing in it but selectors."""
    digits = f"{state.iteration:02}{node}".encode().hex().ljust(64, "7")
    trial = TRIAL.model_copy(
        update={
            "iteration": state.iteration,
            "checkpoint": digits,
            "kl": 0.2 + state.iteration / 997,
            "verdict": "accept",
            "reason": f"KL -0.0039 ± 0.0027 at the same sparsity, round {state.iteration}: better",
            "plan": f"45.0% refit~sequential:kappa-mask@0.8 · {state.iteration} · *.v_proj x2, *.q_proj x0.7, 60 more",
            "recipe": Recipe(strength=0.5),
        }
    )
    lessons = [
        LESSON.model_copy(
            update={"iteration": state.iteration, "selector": f"blocks {i}-{i + 3} · *", "text": "w " * 99}
        )
        for i in range(40)
    ]
    return {
        "profile": {"config": RunConfig(), "profile": digits, "dense": trial},
        "plan": {"iteration": state.iteration + 1, "plan": LONG},
        "approve": {"plan": LONG},
        "prune": {"current": digits},
        "validate": {"trials": [trial]},
        "accept": {"accepted": digits, "accepted_plan": LONG},
        "reflect": {"lessons": lessons, "usage": Usage(calls=state.iteration)},
    }[node]


def test_a_long_run_of_a_large_model_leaves_under_5_mb(tmp_path: Path) -> None:
    """Every list of the state is as long as it may get; what there is of 400 layers lies in artifacts."""
    builder = StateGraph(State, input_schema=Input)
    nodes = ["profile", "plan", "approve", "prune", "validate", "accept", "reflect"]
    for node in nodes:
        builder.add_node(node, partial(fill_long_run, node))
    builder.add_edge(START, "profile")
    for before, after in pairwise(nodes):
        builder.add_edge(before, after)
    builder.add_conditional_edges("reflect", lambda s: END if s.iteration >= ITERATIONS else "plan", [END, "plan"])
    with persistence.open_saver(tmp_path) as saver:
        app = builder.compile(checkpointer=saver)
        app.invoke({"run": "r"}, THREAD | {"recursion_limit": 1000}, durability="sync")
        assert len(app.get_state(THREAD).values["trials"]) == ITERATIONS
        assert sum(1 for _ in app.get_state_history(THREAD)) == 6 * ITERATIONS + 3
    size = sum(path.stat().st_size for path in tmp_path.glob("billhook.sqlite*"))
    assert size < 5e6, f"{size / 1e6:.1f} MB"


def test_file_is_in_wal_mode(tmp_path: Path) -> None:
    run_once(tmp_path)
    with closing(sqlite3.connect(sqlite.database(tmp_path))) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_server_sees_what_the_command_line_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_once(tmp_path)
    monkeypatch.setenv(RUNS_DIR_VARIABLE, str(tmp_path))

    async def read() -> tuple[dict[str, Any], dict[str, Any]]:
        async with persistence.checkpointer() as saver, persistence.store() as store:
            app = build().compile(checkpointer=saver, store=store)
            item = await store.aget(("lessons", "tiny"), "1")
            assert item is not None
            return (await app.aget_state(THREAD)).values, item.value

    values, lesson = asyncio.run(read())
    assert values == VALUES
    assert Lesson(**lesson) == LESSON


def test_processes_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two command lines and a server open a new file together, then read and write in the same transaction."""
    monkeypatch.setenv(RUNS_DIR_VARIABLE, str(tmp_path))

    async def serve() -> None:
        async with persistence.checkpointer() as saver, persistence.store() as store:
            for i in range(60):
                await saver.aget_tuple({"configurable": {"thread_id": "first", "checkpoint_ns": ""}})
                # Asked for together, the two end in one transaction of the store.
                await asyncio.gather(store.aget(("notes",), "none"), store.aput(("notes",), f"server-{i}", {"i": i}))

    others = [start(WRITER, str(tmp_path), name) for name in ("first", "second")]
    asyncio.run(serve())
    for process in others:
        finish(process)
    with persistence.open_saver(tmp_path) as saver, persistence.open_store(tmp_path) as store:
        assert len(store.search(("notes",), limit=1000)) == 180
        for name in ("first", "second"):
            assert len(list(saver.list({"configurable": {"thread_id": name, "checkpoint_ns": ""}}))) == 60


def test_store_waits_for_a_writer_after_reading(tmp_path: Path) -> None:
    """A batch that reads and then writes takes the lock first, so another writer cannot come between."""
    with persistence.open_store(tmp_path) as store:
        with store._cursor():
            other = sqlite3.connect(sqlite.database(tmp_path), timeout=0)
            with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
        store.batch([GetOp(("a",), "k"), PutOp(("a",), "k", {"x": 1})])
        assert store.get(("a",), "k").value == {"x": 1}


def test_damaged_file_is_named_in_one_line(tmp_path: Path) -> None:
    sqlite.database(tmp_path).write_text("this is not a database, whatever its name says")
    with (
        pytest.raises(UserError, match=r"^cannot open .*billhook\.sqlite: file is not a database; where it is "),
        persistence.open_saver(tmp_path),
    ):
        pass


def test_runs_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot open"), persistence.open_store(tmp_path / "runs"):
        pass
