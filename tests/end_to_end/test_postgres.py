"""`--state postgresql://…`: a run's checkpoints and memory in a real PostgreSQL server, which the tests start."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graph import persistence
from graph.persistence import postgres
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    Halt,
    assert_same_weights,
    fork,
    read_events,
    read_run_config,
    read_state,
    read_summary,
    read_trials,
)
from tests.openai_server import Answer, OpenAIServer
from tests.postgres_server import ESCAPED, PASSWORD, PostgresServer, serve_postgres
from tools.plans.costs import count_walk
from tools.workbench.layer_pruning import LayerPruner

SAVE = "langgraph.checkpoint.postgres:PostgresSaver.put"
NOTE = "langgraph.checkpoint.postgres:PostgresSaver.put_writes"

NUMBERS = itertools.count()
"""Of the databases."""

HALTS = [
    Halt("profile", NOTE, after=True),
    Halt("plan", SAVE, 2),
    Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 5),
    Halt("validate", NOTE, after=True),
    Halt("reflect", "graph.nodes.reflect:write_lesson", after=True),
    Halt("finish", NOTE, after=True),
]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with serve_postgres() as server:
        yield server


@pytest.fixture
def url(server: PostgresServer) -> str:
    """A database of the test's own."""
    return server.make_database(f"test_{next(NUMBERS)}")


def assert_same(run: Path, easy: Path, url: str) -> None:
    """The trials, lessons, masks and weights of the run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(persistence.STATE_VARIABLE, url)
        trials, lessons = read_trials(run), read_state(run).lessons
    assert not (run.parent / "billhook.sqlite").exists(), "nothing is kept in two places"
    assert (trials, lessons) == (read_trials(easy), read_state(easy).lessons)
    assert read_summary(run)["mask_sha256"] == read_summary(easy)["mask_sha256"]
    assert_same_weights(run, easy)


@pytest.mark.parametrize("halt", HALTS, ids=lambda halt: f"{halt.node}-{halt.target.rsplit('.', 1)[-1]}")
def test_killed_and_resumed_from_another_process(
    halt: Halt, flags: list[str], easy: Path, url: str, tmp_path: Path, command: Command
) -> None:
    killed = fork(tmp_path, *flags, halt=halt, BILLHOOK_STATE=url).finish()
    run = tmp_path / "runs" / "run"
    assert killed.code == -signal.SIGKILL, killed.err
    assert read_events(run, "node")[-1]["node"] == halt.node
    resumed = command("--resume", "run", "--state", url)
    assert (resumed.code, resumed.err) == (0, "")
    assert_same(run, easy, url)
    again = command("--resume", "run", "--state", url)
    assert (again.code, again.out) == (0, "run run is finished: see runs/run/report.html\n")


def test_a_conversation_goes_on_in_another_process(
    flags: list[str], url: str, tmp_path: Path, command: Command
) -> None:
    probe: Answer = {"tool": "probe", "arguments": {"plan": {"sparsity": 0.45}, "tokens": 64}}
    with OpenAIServer([probe, {"sparsity": 0.45}]) as server:
        given = [*flags, "--planner", server.planner("fine"), "--max-iterations", "1", "--no-memory"]
        halt = Halt("plan", NOTE, 3, after=True)  # of the prompt, a reply and the probe
        killed = fork(tmp_path, *given, halt=halt, BILLHOOK_STATE=url, NO_PROXY="127.0.0.1").finish()
        resumed = command("--resume", "run", "--state", url)
    assert (killed.code, resumed.code) == (-signal.SIGKILL, 0), killed.err + resumed.err
    assert len(server.requests) == 2
    run = tmp_path / "runs" / "run"
    assert [tool["tool"] for tool in read_events(run, "tool")] == ["probe"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(persistence.STATE_VARIABLE, url)
        state = read_state(run)
    curves = count_walk(read_run_config(run))
    assert (state.usage.calls, state.evaluated_tokens) == (2, state.trials[0].tokens + curves), "the probe is kept"


def test_the_password_is_in_no_file_no_row_and_no_message(
    flags: list[str], server: PostgresServer, url: str, tmp_path: Path, command: Command
) -> None:
    halt = Halt("validate", SAVE)
    killed = fork(tmp_path, *flags, "--state", url, halt=halt).finish()
    resumed = command("--resume", "run", "--state", url)
    assert resumed.code == 0
    wrong = command(*flags, "--name", "wrong", "--state", url.replace("pl0ugh", "pl0w"))
    assert wrong.code == 2 and 'password authentication failed for user "billhook"' in wrong.err
    texts = [killed.out, killed.err, resumed.out, wrong.out, wrong.err, server.dump(url)]
    texts += [path.read_bytes().decode(errors="replace") for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    for secret in (PASSWORD, ESCAPED, "pl0ugh", "pl0w"):
        assert not [text[:200] for text in texts if secret in text]
    state = repr(asyncio.run(read_whole_state(url)))  # the dump shows checkpoints as they are kept, compressed
    assert "predicted_kl" in state and "pl0ugh" not in state


async def read_whole_state(url: str) -> list[Any]:
    """Every checkpoint of a database as `langgraph dev` reads it, and what it remembers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(persistence.STATE_VARIABLE, url)
        async with persistence.checkpointer() as saver, persistence.store() as store:
            found = [item async for item in saver.alist(None)]
            remembered = await store.asearch((), limit=1000)
    assert len(found) > 10 and remembered
    return [found, remembered]


def test_memory_is_there_for_the_next_run(flags: list[str], url: str, tmp_path: Path, command: Command) -> None:
    os.environ[persistence.STATE_VARIABLE] = url
    assert command(*flags).code == 0
    second = command(*flags, "--name", "second", "--runs-dir", "elsewhere")
    assert second.code == 0
    assert "3 lessons from 1 earlier run" in second.out
    assert not list(tmp_path.rglob("*.sqlite"))


def test_a_restart_of_the_server_is_survived_and_an_end_stops_the_run(
    flags: list[str], easy: Path, server: PostgresServer, url: str, tmp_path: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compute, calls = LayerPruner.compute, 0

    def disturb(*arguments: Any) -> str:
        nonlocal calls
        calls += 1
        if calls in (2, 20):
            server.stop()
        if calls == 2:
            server.start()
        return compute(*arguments)

    monkeypatch.setattr(LayerPruner, "compute", disturb)
    monkeypatch.setitem(postgres.POOL, "timeout", 1.0)
    stopped = command(*flags, "--state", url)
    assert calls >= 20, "the restart was survived"
    assert (stopped.code, stopped.err) == (1, "")
    reason, resume = stopped.out.splitlines()[-2:]
    assert reason.startswith("stopped: the state's database does not answer: ")
    assert resume == "resume with: python -m graph.run --resume run"
    gone = command("--resume", "run", "--state", url)
    assert gone.code == 2 and gone.err.startswith("error: the PostgreSQL database cannot be used: ")
    server.start()
    assert command("--resume", "run", "--state", url).code == 0
    assert_same(tmp_path / "runs" / "run", easy, url)


# Refusals

REFUSED = {
    "another database": (
        ["--state", "mysql://localhost/x"],
        "--state (or BILLHOOK_STATE) takes postgresql://HOST/DATABASE, ",
    ),
    "no port": (
        ["--state", "postgresql://me:pa/ss@127.0.0.1/x"],
        "the state's address is not of the form postgresql://HOST:PORT/DATABASE, with USER:PASSWORD@ before the host; ",
    ),
    "a bare @": (["--state", "postgresql://me:pa/ss@pass/word@127.0.0.1/x"], "the state's address is not of the form"),
    "a bare @ at the end": (["--state", "postgresql://me:x@pa@127.0.0.1/x"], "the state's address is not of the form"),
    "unknown option": (["--state", "postgresql://127.0.0.1/x?pass/word=1"], "the state's address is not of the form"),
    "nobody there": (
        ["--state", "postgresql://me:s3cr3t-word@127.0.0.1:1/x"],
        "the PostgreSQL database cannot be used: connection failed: ",
    ),
}


@pytest.mark.parametrize(("more", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(
    more: list[str], expected: str, flags: list[str], tmp_path: Path, command: Command
) -> None:
    refused = command(*flags, *more)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"error: {expected}") and refused.err.count("\n") == 1
    assert "pa/ss" not in refused.err and "pass/word" not in refused.err and "s3cr3t" not in refused.err
    assert not (tmp_path / "runs" / "run" / "events.jsonl").exists()


def test_a_run_is_not_resumed_beside_its_checkpoints(
    flags: list[str], server: PostgresServer, url: str, tmp_path: Path, command: Command
) -> None:
    halt = Halt("plan", SAVE)
    assert fork(tmp_path, *flags, halt=halt, BILLHOOK_STATE=url).finish().code == -signal.SIGKILL
    beside = command("--resume", "run")
    assert (beside.code, beside.err) == (
        2,
        "error: run 'run' keeps its checkpoints in PostgreSQL: name it with --state or in BILLHOOK_STATE\n",
    )
    other = command("--resume", "run", "--state", server.make_database("other"))
    assert other.code == 2
    assert other.err.startswith("error: the checkpoints of run 'run' are not in this database")
    assert command("--runs-dir", "lite", *flags, "--max-iterations", "1").code == 0
    lite = command("--resume", "run", "--runs-dir", "lite", "--state", url)
    assert lite.err == "error: run 'run' keeps its checkpoints in SQLite: leave --state out\n"


def test_missing_packages_are_named(flags: list[str], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("graph.persistence.postgres")
    monkeypatch.delitem(sys.modules, "graph.persistence.postgres")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    missing = command(*flags, "--state", "postgresql://127.0.0.1/x")
    assert (missing.code, missing.err) == (
        2,
        "error: the packages for PostgreSQL are not installed; install them with: pip install -e '.[postgres]'\n",
    )
