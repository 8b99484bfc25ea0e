"""`python -m graph.studio`: past runs become threads of a local server, and nothing is left running."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from langgraph_sdk import get_sync_client

from graph import persistence, studio
from tests.chromium import COMMAND
from tests.foreign_page import visit_with_pages
from tests.paths import IMPORTS
from tools.base.errors import UserError

ROOT = studio.ROOT

# A graph in a directory of its own, so that this file tests the server and not Billhook's loop.
GRAPH = """
from langgraph.graph import END, START, StateGraph
from graph.state import Input, Plan, State

def plan(state: State) -> dict:
    return {"plan": Plan(sparsity=0.3), "iteration": state.iteration + 1}

graph = StateGraph(State, input_schema=Input)
graph.add_node("plan", plan)
graph.add_edge(START, "plan").add_edge("plan", END)
"""
START = "import sys; from pathlib import Path; from graph import studio; studio.ROOT = Path(sys.argv[1]); "
START += "sys.exit(studio.main(['--port', sys.argv[2], '--runs-dir', 'runs']))"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((studio.HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signal handlers as they were, after a `main` in this process."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(kind) for kind in kinds]
    yield
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)


def write_run(runs_dir: Path, name: str, content: str) -> None:
    (runs_dir / name).mkdir(parents=True)
    (runs_dir / name / "run.json").write_text(content)


def test_runs_are_found_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thread = str(uuid.uuid4())
    write_run(tmp_path, "good", json.dumps({"thread_id": thread, "more": 1}))
    for name, content in {
        "cut-off": '{"thread',
        "list": "[]",
        "no-thread": "{}",
        "not-a-uuid": '{"thread_id": "1"}',
        "number": '{"thread_id": 7}',
    }.items():
        write_run(tmp_path, name, content)
    (tmp_path / "without-run").mkdir()
    assert studio.find_runs(tmp_path) == {"good": thread}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all("names no thread" in line for line in lines)


def test_missing_server_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], handlers: None
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert studio.main([]) == 2
    assert capsys.readouterr().err == (
        "Studio's server is not installed; install it with: pip install -e '.[studio]'\n"
    )


def test_another_kind_of_database_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], handlers: None
) -> None:
    monkeypatch.setenv(persistence.STATE_VARIABLE, "")
    assert studio.main(["--state", "mysql://me:secret@localhost/x"]) == 2
    assert capsys.readouterr().err == (
        "--state (or BILLHOOK_STATE) takes postgresql://HOST/DATABASE, or nothing for SQLite\n"
    )


def test_taken_port_is_refused() -> None:
    with socket.socket() as other:
        other.bind((studio.HOST, 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {taken} is taken"):
            studio.check_can_serve(taken)


def test_missing_config_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int) -> None:
    monkeypatch.setattr(studio, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"langgraph\.json is missing"):
        studio.check_can_serve(port)


@pytest.mark.parametrize("text", ["0", "65536", "-1", "x", ""])
def test_bad_port_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        studio.main([f"--port={text}"])
    assert "is not a port between 1 and 65535" in capsys.readouterr().err


def test_server_stays_on_this_machine() -> None:
    command = studio._command(2024)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--tunnel" not in command


def make_root(directory: Path, graph: str) -> None:
    """A clone's root that serves `graph` with Billhook's own persistence."""
    config = json.loads((ROOT / "langgraph.json").read_text())
    config["graphs"]["billhook"]["path"] = "served_graph:graph"
    directory.mkdir()
    (directory / "langgraph.json").write_text(json.dumps(config))
    (directory / "served_graph.py").write_text(graph)


def start(tmp_path: Path, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, str(tmp_path / "root"), str(port)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": IMPORTS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def write_history(runs_dir: Path, thread: str) -> None:
    """A run as the command line leaves it: a checkpointed thread and a run.json."""
    scope: dict = {}
    exec(GRAPH, scope)
    with persistence.open_saver(runs_dir) as saver:
        app = scope["graph"].compile(checkpointer=saver)
        app.invoke({"run": "first"}, {"configurable": {"thread_id": thread}})
    write_run(runs_dir, "first", json.dumps({"thread_id": thread}))


def children_of(port: int) -> list[str]:
    """Command lines of the servers on `port` that are still there."""
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if "langgraph_cli" in line and f"--port {port}" in line]


@pytest.mark.slow
def test_past_run_is_served_and_the_server_ends_with_ctrl_c(tmp_path: Path, port: int) -> None:
    thread = str(uuid.uuid4())
    make_root(tmp_path / "root", GRAPH)
    write_history(tmp_path / "runs", thread)
    process = start(tmp_path, port)
    assert process.stdout is not None
    try:
        shown = []
        for line in process.stdout:
            shown.append(line)
            if line.startswith("Ctrl-C"):
                break
        assert f"Studio: https://smith.langchain.com/studio/?baseUrl=http://127.0.0.1:{port}\n" in shown
        assert f"  first  {thread}\n" in shown

        with get_sync_client(url=f"http://127.0.0.1:{port}", api_key=None) as client:
            assert client.threads.get(thread)["metadata"]["run"] == "first"
            assert client.threads.get_state(thread)["values"]["plan"]["sparsity"] == 0.3
            before_plan = next(state for state in client.threads.get_history(thread) if state["next"] == ["plan"])
            fork = client.runs.wait(thread, "billhook", input=None, checkpoint=before_plan["checkpoint"])
            assert fork["iteration"] == 1
            if COMMAND is not None:
                visit_with_pages(tmp_path / "browser", client, port, tmp_path / "runs", {})
        assert children_of(port)
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest.strip()) == (0, "stopped")
    assert children_of(port) == []


@pytest.mark.slow
def test_server_that_cannot_start_says_why(tmp_path: Path, port: int) -> None:
    make_root(tmp_path / "root", "raise RuntimeError('boom')")
    process = start(tmp_path, port)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "boom" in output
    assert "the server ended by itself" in output.splitlines()[-1]
    assert children_of(port) == []
