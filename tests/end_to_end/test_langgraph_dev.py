"""`langgraph dev` on the real graph, driven through its SDK, beside runs made by the command line."""

import json
import re
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from langgraph_sdk import get_sync_client
from langgraph_sdk.client import SyncLangGraphClient

from graph import run, studio
from graph.config import RunConfig, read_prompt
from graph.doors import FOREIGN_HOST, FOREIGN_ORIGIN, NO_SUCH_PAGE, STUDIO
from tests.chromium import COMMAND
from tests.end_to_end.helpers import fingerprint, read_events, wait_for
from tests.foreign_page import visit_with_pages
from tests.tiny import save_tiny_model, tiny_settings
from tools.base.options import CONFIGS, read_yaml

pytestmark = pytest.mark.slow

NODES = {"profile", "brief", "plan", "approve", "prune", "validate", "accept", "rollback", "reflect", "finish"}


def tiny_config(model: Path) -> dict[str, Any]:
    settings = tiny_settings(model, window=32)
    return RunConfig(**settings.model_dump(), max_iterations=2, tau=10).model_dump()


class Served(NamedTuple):
    """A server on a runs directory that holds a finished run "cli"."""

    runs: Path
    model: Path
    mask_sha256: str
    client: SyncLangGraphClient
    port: int


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("dev")
    model, runs = save_tiny_model(home / "model"), home / "runs"
    config = home / "tiny.yaml"
    config.write_text(json.dumps(tiny_config(model)), encoding="utf-8")  # JSON is YAML
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILLHOOK_RUNS_DIR", str(runs))
        patch.chdir(home)
        assert run.main(["--config", str(config), "--name", "cli"]) == 0
        made = json.loads((runs / "cli" / "summary.json").read_text())
        with socket.socket() as free:
            free.bind((studio.HOST, 0))
            port = free.getsockname()[1]
        with studio.serve(port, runs):
            studio.register_configs(port)
            studio.register_runs(port, runs)
            with get_sync_client(url=f"http://{studio.HOST}:{port}", api_key=None) as client:
                yield Served(runs, model, made["mask_sha256"], client, port)


@pytest.mark.skipif(COMMAND is None, reason="chromium is not installed")
def test_no_page_in_a_browser_starts_a_run_but_studio_s(served: Served, tmp_path: Path) -> None:
    context = tiny_config(served.model) | {"max_iterations": 1}
    visit_with_pages(tmp_path / "browser", served.client, served.port, served.runs, context)
    assert (served.runs / "openly" / "summary.json").is_file(), "the run of Studio's page"


ASKING = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
NETWORK = {"Access-Control-Request-Private-Network": "true"}


def test_requests_of_foreign_pages_and_names_are_refused(served: Served) -> None:
    own, starts = f"127.0.0.1:{served.port}", {"assistant_id": "billhook", "input": {"run": "foreign"}}
    before = {thread["thread_id"] for thread in served.client.threads.search(limit=1000)}
    with httpx.Client(base_url=f"http://{own}", trust_env=False, timeout=60) as client:

        def ask(path: str, headers: dict[str, str], method: str = "POST") -> tuple[int, str, str]:
            text = json.dumps(starts if path == "/runs" else {})
            answer = client.request(method, path, content=text, headers={"Content-Type": "text/plain", **headers})
            allowed = answer.headers.get("access-control-allow-origin", "")
            return (
                answer.status_code,
                answer.text,
                allowed + answer.headers.get("access-control-allow-private-network", ""),
            )

        pages = (
            "http://evil.example",
            "null",
            "http://127.0.0.1:1",
            f"{STUDIO}.evil.example",
            "http://smith.langchain.com",
        )
        for origin in pages:
            for path in ("/runs", "/threads", "/info", "/ok", "/store/items"):
                assert ask(path, {"Origin": origin}) == (403, f"{FOREIGN_ORIGIN}\n", ""), (origin, path)
            for more in ({}, NETWORK):
                refused = ask("/runs", {"Origin": origin, **ASKING, **more}, "OPTIONS")
                assert refused == (403, f"{FOREIGN_ORIGIN}\n", "")
        for host in ("evil.example", f"evil.example:{served.port}", "0.0.0.0", "127.0.0.1.evil.example"):
            assert ask("/runs", {"Host": host}) == (400, f"{FOREIGN_HOST}\n", "")
            assert ask("/runs", {"Host": host, "Origin": STUDIO}) == (400, f"{FOREIGN_HOST}\n", "")
        for path in ("/deploy", "/deploy/", "/internal/truncate"):
            assert ask(path, {"Origin": STUDIO}) == (404, f"{NO_SUCH_PAGE}\n", "")
        for path in ("/mcp", "/a2a/billhook"):
            assert ask(path, {})[0] == 404
        assert {thread["thread_id"] for thread in served.client.threads.search(limit=1000)} == before
        assert ask("/threads", {"Origin": STUDIO})[::2] == (200, STUDIO)
        assert ask("/threads", {"Origin": f"http://{own}"})[0] == 200
        assert ask("/threads", {"Origin": f"http://localhost:{served.port}"})[0] == 200
        assert ask("/runs", {"Origin": STUDIO, **ASKING}, "OPTIONS")[::2] == (200, f"{STUDIO}true")
        assert ask("/runs", {"Origin": STUDIO, **ASKING, **NETWORK}, "OPTIONS")[::2] == (200, f"{STUDIO}true")
    assert not (served.runs / "foreign").exists()


def test_what_a_server_may_not_name_is_refused_in_one_line_before_anything_is_made(served: Served) -> None:
    client, thread = served.client, served.client.threads.create()["thread_id"]
    evil, started = "openai:x@http://evil.example/v1", "start the run with python -m graph.run"
    name_it = "name it in a file of configs/ or in BILLHOOK"
    refusals: dict[str, tuple[Any, str]] = {
        "planner": (
            evil,
            f"planner {evil!r} is refused on a server: it is an address that no config names; {name_it}_PLANNER, or "
            f"{started}",
        ),
        "test": (
            "file:/etc/passwd",
            "test 'file:/etc/passwd' is refused on a server: it is outside of the runs directory and the present one; "
            f"{name_it}_TEST, or {started}",
        ),
        "planner_prompt": (
            "file:/etc/passwd",
            "planner_prompt: files are read as prompts at the command line alone; give the text itself",
        ),
        "trust_remote_code": (
            True,
            "trust_remote_code is refused on a server: what runs code of a hub is started with python -m graph.run",
        ),
    }
    before = set(served.runs.iterdir())
    for field, (value, reason) in refusals.items():
        context = tiny_config(served.model) | {field: value}
        with pytest.raises(Exception, match=f"^UserError: {re.escape(reason)}$"):
            client.runs.wait(thread, "billhook", input={"run": "hostile"}, context=context)
    copied: Any = client.threads.copy(json.loads((served.runs / "cli" / "run.json").read_text())["thread_id"])
    config = tiny_config(served.model) | {"reflector": evil}
    client.threads.update_state(copied["thread_id"], {"config": config, "stop": ""}, as_node="reflect")
    with pytest.raises(Exception, match="is refused on a server: it is an address that no config names"):
        client.runs.wait(copied["thread_id"], "billhook", input=None)
    assert set(served.runs.iterdir()) == before


def test_graph_has_its_conditional_edges_and_schemas(served: Served) -> None:
    client = served.client
    assistant = client.assistants.search(graph_id="billhook")[0]["assistant_id"]
    drawn = client.assistants.get_graph(assistant)
    assert {node["id"] for node in drawn["nodes"]} == NODES | {"__start__", "__end__"}
    branches = {(edge["source"], edge["target"]) for edge in drawn["edges"] if edge.get("conditional")}
    assert branches == {
        ("profile", "brief"),
        ("profile", "plan"),
        ("brief", "plan"),
        ("plan", "approve"),
        ("plan", "prune"),
        ("plan", "rollback"),
        ("plan", "finish"),
        ("approve", "prune"),
        ("approve", "plan"),
        ("approve", "rollback"),
        ("approve", "finish"),
        ("prune", "validate"),
        ("prune", "rollback"),
        ("prune", "plan"),
        ("prune", "finish"),
        ("validate", "accept"),
        ("validate", "rollback"),
        ("accept", "reflect"),
        ("rollback", "reflect"),
        ("reflect", "plan"),
        ("reflect", "profile"),
        ("reflect", "finish"),
    }
    schemas = client.assistants.get_schemas(assistant)
    assert all(schemas[kind] for kind in ("input_schema", "output_schema", "state_schema", "context_schema"))
    inputs, fields = schemas["input_schema"]["properties"], schemas["context_schema"]["properties"]
    assert set(inputs) == {"run", "replay"}
    assert set(fields) == set(RunConfig.model_fields)
    assert all(field.get("description") for field in [*inputs.values(), *fields.values()])
    nodes = {name: field["langgraph_nodes"] for name, field in fields.items() if "langgraph_nodes" in field}
    assert (nodes["planner"], nodes["reflector"], nodes["approve"]) == (["plan"], ["reflect"], ["approve", "brief"])
    prompts = {name: field for name, field in fields.items() if field.get("langgraph_type") == "prompt"}
    assert {(*nodes[name], field["default"]) for name, field in prompts.items()} == {
        ("plan", read_prompt("planner")),
        ("reflect", read_prompt("reflector")),
    }


def test_every_config_is_an_assistant_whose_planner_and_reflector_can_be_changed(served: Served) -> None:
    client = served.client
    found = {assistant["name"]: assistant for assistant in client.assistants.search(graph_id="billhook", limit=100)}
    assert {file.stem for file in CONFIGS.glob("*.yaml")} <= found.keys()
    assert found["paper"]["context"] == read_yaml(CONFIGS / "paper.yaml")
    mine = client.assistants.create(
        "billhook",
        name="mine",
        context=tiny_config(served.model) | {"planner": "openai:nobody", "reflector": "heuristic"},
    )
    thread = client.threads.create()["thread_id"]
    with pytest.raises(Exception, match="OPENAI_API_KEY"):
        client.runs.wait(thread, mine["assistant_id"], input={"run": "keyless"})
    assert not (served.runs / "keyless").exists(), "it was refused before anything was made"
    client.assistants.update(mine["assistant_id"], context=tiny_config(served.model) | {"max_iterations": 1})
    out = client.runs.wait(thread, mine["assistant_id"], input={"run": "of-mine"})
    assert (out["iteration"], out["config"]["max_iterations"]) == (1, 1)


def test_a_run_of_the_command_line_has_its_history_and_can_be_forked(
    served: Served,
) -> None:
    runs, client = served.runs, served.client
    before = fingerprint(runs / "cli")
    thread = json.loads((runs / "cli" / "run.json").read_text())["thread_id"]
    assert client.threads.get(thread)["metadata"]["run"] == "cli"
    history = client.threads.get_history(thread, limit=100)
    assert history[0]["next"] == []
    trials = history[0]["values"]["trials"]
    assert [trial["iteration"] for trial in trials] == [1, 2]
    before_prune = next(state for state in history if state["next"] == ["prune"] and state["values"]["iteration"] == 2)
    plan = before_prune["values"]["plan"] | {"sparsity": 0.2}
    edited = client.threads.update_state(thread, {"plan": plan}, as_node="plan", checkpoint=before_prune["checkpoint"])
    out = client.runs.wait(thread, "billhook", input=None, checkpoint=edited["checkpoint"])
    assert [trial["iteration"] for trial in out["trials"]] == [1, 2]
    assert out["trials"][0] == trials[0]
    assert out["trials"][1]["sparsity"] == pytest.approx(0.2, abs=5e-4)
    assert fingerprint(runs / "cli") == before
    forked = runs / out["run"]
    assert forked.name.startswith("cli-fork-")
    assert json.loads((forked / "summary.json").read_text())["run"] == forked.name
    copied: Any = client.threads.copy(thread)
    client.threads.update_state(copied["thread_id"], {"stop": ""}, as_node="reflect")
    again = client.runs.wait(copied["thread_id"], "billhook", input=None)
    assert again["run"].startswith("cli-fork-") and again["run"] != forked.name
    assert fingerprint(runs / "cli") == before


def test_a_plan_is_edited_and_accepted_in_studio(served: Served) -> None:
    runs, client = served.runs, served.client
    thread = client.threads.create()["thread_id"]
    config = tiny_config(served.model) | {"approve": "plans"}

    def go(**more: Any) -> dict[str, Any]:
        """Run until it asks; the question."""
        client.runs.wait(thread, "billhook", context=config, **more)
        state = client.threads.get_state(thread)
        (asked,) = [interrupt for task in state["tasks"] for interrupt in task["interrupts"]] or [{"value": {}}]
        return dict(asked)

    asked = go(input={"run": "approved"})
    assert set(asked["response_schema"]["properties"]) == {"decision", "plan", "reason"}
    assert all(field.get("description") for field in asked["response_schema"]["properties"].values())
    question = asked["value"]
    assert (question["iteration"], question["problem"]) == (1, "")
    assert question["predicted_kl"] > 0
    bad = question["plan"] | {"sparsity": 0.99}
    again = go(command={"resume": {"decision": "edit", "plan": bad}})["value"]
    assert again["problem"].startswith("sparsity 0.99 is above the target")
    edited = question["plan"] | {"sparsity": 0.25}
    assert go(command={"resume": {"decision": "edit", "plan": edited}})["value"]["iteration"] == 2
    assert go(command={"resume": {"decision": "refuse", "reason": "enough", "plan": None}})["value"] == {}
    trials = client.threads.get_state(thread)["values"]["trials"]
    assert trials[0]["sparsity"] == pytest.approx(0.25, abs=5e-4)
    assert [(trial["verdict"], trial["reason"]) for trial in trials[1:]] == [("refuse", "enough")]
    assert json.loads((runs / "approved" / "summary.json").read_text())["iterations"] == 2


def test_a_run_that_waits_in_the_terminal_is_answered_in_studio(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, client = served.runs, served.client
    config = served.runs.parent / "tiny.yaml"
    monkeypatch.setenv("BILLHOOK_RUNS_DIR", str(runs))
    assert run.main(["--config", str(config), "--name", "waits", "--approve", "plans"]) == 1
    thread = json.loads((runs / "waits" / "run.json").read_text())["thread_id"]
    client.threads.create(thread_id=thread, graph_id="billhook", if_exists="do_nothing")
    client.runs.wait(thread, "billhook", command={"resume": "accept"})
    state = client.threads.get_state(thread)
    assert state["values"]["trials"][0]["iteration"] == 1 and state["next"] == ["approve"]
    assert not list(runs.glob("waits-fork-*"))


def test_a_cancelled_run_stops_and_the_next_one_has_the_model(served: Served) -> None:
    runs, client = served.runs, served.client
    thread, log = client.threads.create()["thread_id"], runs / "cancelled" / "events.jsonl"
    long = tiny_config(served.model) | {"max_iterations": 200, "patience": 200, "window": 128, "target_sparsity": 0.6}
    started = client.runs.create(thread, "billhook", input={"run": "cancelled"}, context=long)
    wait_for(lambda: log.is_file() and '"node": "prune"' in log.read_text())
    client.runs.cancel(thread, started["run_id"], wait=True)
    other = client.threads.create()["thread_id"]
    out = client.runs.wait(other, "billhook", input={"run": "after"}, context=tiny_config(served.model))
    assert json.loads((runs / "after" / "summary.json").read_text())["mask_sha256"] == served.mask_sha256
    assert out["trials"]
    silent = log.read_bytes()
    assert read_events(runs / "cancelled")[-1]["time"] <= read_events(runs / "after", "profile")[0]["time"]
    state = client.threads.get_state(thread)
    assert state["next"] and state["values"]["iteration"] < 200
    client.runs.wait(thread, "billhook", input=None, interrupt_before=["reflect"])
    assert len(log.read_bytes()) > len(silent), "it can be taken up again"


def test_a_run_started_in_studio_lands_in_a_run_directory(served: Served) -> None:
    runs, model, client = served.runs, served.model, served.client
    thread = client.threads.create(thread_id=str(uuid.uuid4()))["thread_id"]
    nodes = [
        name
        for part in client.runs.stream(
            thread, "billhook", input={"run": "studio-made"}, context=tiny_config(model), stream_mode="updates"
        )
        if part.event == "updates"
        for name in part.data
    ]
    assert nodes[:4] == ["profile", "plan", "prune", "validate"]
    assert nodes[-1] == "finish"
    assert set(nodes) <= NODES
    summary = json.loads((runs / "studio-made" / "summary.json").read_text())
    assert summary["iterations"] == 2
    # The same config as the command line's, so the same masks: the lessons of an identical run are not counted twice.
    assert summary["mask_sha256"] == served.mask_sha256
    assert client.store.search_items(("lessons",))["items"]
