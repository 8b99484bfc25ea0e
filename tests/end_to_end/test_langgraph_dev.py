"""`langgraph dev` on the real graph, driven through its SDK, beside runs made by the command line."""

import json
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from langgraph_sdk import get_sync_client
from langgraph_sdk.client import SyncLangGraphClient

from graph import run, studio
from graph.config import RunConfig
from tests.tiny import save_tiny_model, tiny_settings

pytestmark = pytest.mark.slow

NODES = {"profile", "plan", "prune", "validate", "accept", "rollback", "reflect", "finish"}


def tiny_config(model: Path) -> dict[str, Any]:
    settings = tiny_settings(model, window=32)
    return RunConfig(**settings.model_dump(), max_iterations=2, tau=10).model_dump()


class Served(NamedTuple):
    """A server on a runs directory that holds a finished run "cli"."""

    runs: Path
    model: Path
    mask_sha256: str
    client: SyncLangGraphClient


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
            studio.register_runs(port, runs)
            with get_sync_client(url=f"http://{studio.HOST}:{port}", api_key=None) as client:
                yield Served(runs, model, made["mask_sha256"], client)


def test_graph_has_its_conditional_edges_and_schemas(served: Served) -> None:
    client = served.client
    assistant = client.assistants.search(graph_id="billhook")[0]["assistant_id"]
    drawn = client.assistants.get_graph(assistant)
    assert {node["id"] for node in drawn["nodes"]} == NODES | {"__start__", "__end__"}
    branches = {(edge["source"], edge["target"]) for edge in drawn["edges"] if edge.get("conditional")}
    assert branches == {
        ("plan", "prune"),
        ("plan", "finish"),
        ("validate", "accept"),
        ("validate", "rollback"),
        ("reflect", "plan"),
        ("reflect", "profile"),
        ("reflect", "finish"),
    }
    schemas = client.assistants.get_schemas(assistant)
    assert all(schemas[kind] for kind in ("input_schema", "output_schema", "state_schema", "context_schema"))
    assert set(schemas["input_schema"]["properties"]) == {"run"}
    fields = schemas["context_schema"]["properties"]
    assert set(fields) == set(RunConfig.model_fields)
    assert all(field.get("description") for field in fields.values())


def test_a_run_of_the_command_line_has_its_history_and_can_be_forked(
    served: Served,
) -> None:
    runs, client = served.runs, served.client
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
