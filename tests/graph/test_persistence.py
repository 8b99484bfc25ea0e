"""The SQLite file: what is written comes back with its types, without pickle, from two processes at once."""

import asyncio
import os
import pickle
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import GetOp, PutOp

from graph import persistence
from graph.config import RunConfig
from graph.state import Lesson, Plan, State, Trial, Usage
from tools.errors import UserError
from tools.recipes import Adjustment, Recipe
from tools.settings import WorkbenchSettings

ROOT = Path(__file__).resolve().parents[2]
THREAD = {"configurable": {"thread_id": "7d9a3f1e-0000-4000-8000-000000000001"}}

TRIAL = Trial(
    iteration=1, checkpoint="ab12", sparsity=0.3, perplexity=None, kl=0.25, predicted_kl=0.2, verdict="rollback"
)
LESSON = Lesson(run="r", iteration=1, selector="*.v_proj", factor=2.0, predicted=0.2, measured=0.4, text="dear")
VALUES: dict[str, Any] = {
    "run": "r",
    "config": RunConfig(target_sparsity=0.3, protect=["blocks 0-1"]),
    "profile": "cd34",
    "dense": TRIAL.model_copy(update={"iteration": 0, "perplexity": 12.5, "verdict": "accept"}),
    "iteration": 1,
    "plan": Plan(
        sparsity=0.3,
        recipe=Recipe(method="wanda", refit=False),
        adjustments=[Adjustment(selector="*.v_proj", action="factor", factor=2.0, reason="they hurt")],
        reason="small steps",
    ),
    "current": "ab12",
    "accepted": "dense",
    "accepted_plan": Plan(sparsity=0.2, reason="smaller"),
    "trials": [TRIAL],
    "lessons": [LESSON],
    "usage": Usage(calls=1, input_tokens=1000, output_tokens=50, cost=0.01),
    "stop": "patience",
    "seconds": 1.5,
}

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
from tests.graph.test_persistence import THREAD, VALUES, build

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
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def test_values_cover_the_whole_state() -> None:
    assert VALUES.keys() == State.model_fields.keys()


def test_every_value_keeps_its_type(caplog: pytest.LogCaptureFixture) -> None:
    serializer = persistence.serializer()
    for name, value in VALUES.items():
        again = serializer.loads_typed(serializer.dumps_typed(value))
        assert type(again) is type(value), name
        assert again == value, name
    assert not caplog.records


def test_another_class_is_not_revived() -> None:
    serializer = persistence.serializer()
    again = serializer.loads_typed(serializer.dumps_typed(WorkbenchSettings()))
    assert again == WorkbenchSettings().model_dump()


def test_run_reads_back_in_a_strict_process(tmp_path: Path) -> None:
    run_once(tmp_path)
    assert finish(start(READER, str(tmp_path), LANGGRAPH_STRICT_MSGPACK="true")) == ""


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "dumps", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    run_once(tmp_path)
    with closing(sqlite3.connect(persistence.database(tmp_path))) as connection:
        rows = connection.execute("SELECT type FROM checkpoints UNION SELECT type FROM writes").fetchall()
    assert {kind for (kind,) in rows} <= {"msgpack", "null"}


def test_file_is_in_wal_mode(tmp_path: Path) -> None:
    run_once(tmp_path)
    with closing(sqlite3.connect(persistence.database(tmp_path))) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_server_sees_what_the_command_line_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_once(tmp_path)
    monkeypatch.setenv(persistence.RUNS_DIR_VARIABLE, str(tmp_path))

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
    monkeypatch.setenv(persistence.RUNS_DIR_VARIABLE, str(tmp_path))

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
            other = sqlite3.connect(persistence.database(tmp_path), timeout=0)
            with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
        store.batch([GetOp(("a",), "k"), PutOp(("a",), "k", {"x": 1})])
        assert store.get(("a",), "k").value == {"x": 1}


@pytest.mark.parametrize("value", ["", None])
def test_runs_directory_defaults_to_runs(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(persistence.RUNS_DIR_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(persistence.RUNS_DIR_VARIABLE, value)
    assert persistence.runs_directory() == Path("runs")


def test_damaged_file_is_named_in_one_line(tmp_path: Path) -> None:
    persistence.database(tmp_path).write_text("this is not a database, whatever its name says")
    with (
        pytest.raises(UserError, match=r"^cannot open .*billhook\.sqlite: file is not a database$"),
        persistence.open_saver(tmp_path),
    ):
        pass


def test_runs_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot open"), persistence.open_store(tmp_path / "runs"):
        pass
