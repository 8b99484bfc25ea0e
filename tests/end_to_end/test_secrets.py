"""An API key is in no file of a run and in nothing that is said, whatever an endpoint does with it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from graph.persistence import open_saver
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, Halt, Outcome, fork, read_events
from tests.openai_server import OpenAIServer

KEY = "sk-proj-Zp3vQ8xT-b\\quoted'\"1"
PLAIN = "7f1e9d4c2b8a6053"  # as keys of a local endpoint look: nothing but its variable tells that it is one


def assert_kept_secret(key: str, home: Path, *outcomes: Outcome) -> None:
    """The key, whole or its middle, is in no file and no output."""
    middle = key[2:12]
    for outcome in outcomes:
        assert middle not in outcome.out and middle not in outcome.err
    files = [path for path in (home / "runs").rglob("*") if path.is_file()]
    assert {"billhook.sqlite", "events.jsonl", "config.yaml"} <= {path.name for path in files}
    for path in files:
        assert middle.encode() not in path.read_bytes(), path
    with open_saver(home / "runs") as saver:  # in the file they are compressed
        kept = repr(list(saver.list(None)))
    assert "max_iterations" in kept and middle not in kept


@pytest.mark.parametrize("key", [KEY, PLAIN], ids=["sk", "plain"])
@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_key_that_the_endpoint_quotes(
    key: str, place: str, tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    if place == "environment":
        os.environ["BILLHOOK_API_KEY"] = key
    else:
        escaped = key.replace("\\", "\\\\").replace("'", "\\'")
        (tmp_path / ".env").write_text(f"BILLHOOK_API_KEY='{escaped}'\n")
    flags = [*TINY, "--model", str(tiny_llama), "--max-iterations", "2", "--agent-retries", "0", "--planner"]
    with OpenAIServer() as server:
        refused = command("--name", "refused", *flags, server.planner("unauthorized"))
        forbidden = command("--name", "forbidden", *flags, server.planner("forbidden"))
        echoed = command("--name", "echoed", *flags, server.planner("echo-key"))
    assert {request.key for request in server.requests} == {key}, "it was sent"
    assert (refused.code, forbidden.code, echoed.code) == (1, 1, 0)
    assert "wants another API key than BILLHOOK_API_KEY holds (HTTP 401)" in refused.out
    assert "denies access" in forbidden.out
    (plan, *_) = read_events(tmp_path / "runs" / "echoed", "plan")
    assert plan["reason"] == "your key is [key]"
    assert_kept_secret(key, tmp_path, refused, forbidden, echoed)


def test_a_run_that_was_killed_leaves_no_key_in_the_journal(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    halt = Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 3)
    with OpenAIServer() as server:
        flags = ["--name", "x", *TINY, "--model", str(tiny_llama), "--planner", server.planner("echo-key")]
        killed = fork(tmp_path, *flags, halt=halt, BILLHOOK_API_KEY=PLAIN).finish()
    assert killed.code == -signal.SIGKILL
    assert (tmp_path / "runs" / "billhook.sqlite-wal").stat().st_size > 0
    assert_kept_secret(PLAIN, tmp_path, killed)


def a_hub_model(home: Path) -> list[str]:
    return ["--model", f"./{PLAIN}"]


def a_planner(home: Path) -> list[str]:
    return ["--planner", f"magic:{PLAIN}"]


def a_yaml_field(home: Path) -> list[str]:
    (home / "mine.yaml").write_text(f"{PLAIN}: 1\n")
    return ["--config", "mine.yaml"]


@pytest.mark.parametrize("mistake", [a_hub_model, a_planner, a_yaml_field])
def test_a_key_in_the_wrong_place_is_not_repeated(
    mistake: Callable[[Path], list[str]], tmp_path: Path, command: Command
) -> None:
    os.environ["BILLHOOK_API_KEY"] = PLAIN
    outcome = command(*mistake(tmp_path))
    assert outcome.code == 2 and "[key]" in outcome.err
    assert PLAIN not in outcome.out + outcome.err


def test_a_password_in_the_planners_address_is_refused(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("--model", str(tiny_llama), "--planner", f"openai:m@http://me:{PLAIN}@127.0.0.1:8000/v1")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "error: the model's address holds a password; put its key into the environment variable "
        "BILLHOOK_127_0_0_1_API_KEY instead\n"
    )
    assert not (tmp_path / "runs").exists()
