"""What stays on disk while round after round is rolled back."""

from pathlib import Path
from typing import Any

import pytest
from langgraph.runtime import Runtime
from torch import Tensor

from graph.config import RunConfig
from graph.nodes.profile import profile
from graph.nodes.prune import prune
from graph.nodes.rollback import rollback
from graph.nodes.validate import validate
from graph.planning.plan import Plan
from graph.state import State
from tests.tiny import tiny_settings
from tools.base.settings import KEPT
from tools.models.disk import list_disk
from tools.plans.recipe import parse_recipe
from tools.workbench import open as workbench
from tools.workbench.store import ArtifactStore

ROUNDS = 10


@pytest.mark.usefixtures("workbench_closed")
def test_the_layers_on_disk_never_take_more_than_the_disk_check_reckons_with(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer of every round is another file."""
    monkeypatch.setenv("BILLHOOK_RUNS_DIR", str(tmp_path))
    config = RunConfig.model_validate(
        tiny_settings(tiny_llama).model_dump() | {"memory": False, "target_sparsity": 0.8, "max_iterations": ROUNDS}
    )
    runtime: Runtime[RunConfig] = Runtime(context=config, stream_writer=lambda _: None)

    def work(node: Any, **update: Any) -> None:
        nonlocal state
        update |= node(state.model_copy(update=update), runtime)
        state = state.model_copy(update=update | {"trials": [*state.trials, *update.get("trials", [])]})

    state = State(run="run", config=config)
    work(profile)
    measured, write, sizes = set(tmp_path.rglob("*.safetensors")), ArtifactStore.write_tensors, []

    def watch(store: ArtifactStore, tensors: dict[str, Tensor]) -> str:
        digest = write(store, tensors)
        sizes.append([path.stat().st_size for path in set(tmp_path.rglob("*.safetensors")) - measured])
        return digest

    monkeypatch.setattr(ArtifactStore, "write_tensors", watch)
    for n in range(ROUNDS):
        plan = Plan(sparsity=0.2 + n / 20, recipe=parse_recipe("two-sided+refit"))
        work(prune, iteration=n + 1, plan=plan)
        made = state.current
        work(validate)
        work(rollback)
        (bench,) = workbench._open
        artifacts = bench.pruner.list_artifacts(made).values()
        assert all(bench.store.has(artifact, ".safetensors") for artifact in artifacts), "a resumed rollback reads them"
    lines = list_disk(bench.model, bench.weights.layers, bench.settings, checkpoints=config.checkpoints)
    (line,) = [x for x in lines if x.what == "layers of checkpoints"]
    layers = len(bench.weights.layers)
    assert line.how == f"{KEPT + 1} × the prunable layers, each with its mask"
    assert max(len(files) for files in sizes) == KEPT * layers, "two of the last rounds, and the one in the making"
    assert max(sum(files) for files in sizes) <= line.bytes
    assert len(sizes) == ROUNDS * layers


def test_few_rounds_and_a_rule_that_probes_nothing_take_less() -> None:
    def count(**changes: Any) -> int:
        return RunConfig.model_validate({"model": "x", **changes}).checkpoints

    assert [count(max_iterations=rounds) for rounds in (1, 2, 3, 9)] == [2, 3, 4, 4], "Wanda beside one that is kept"
    chat = {"planner": "openai:gpt-5.1"}
    assert [count(**chat, max_iterations=rounds) for rounds in (1, 3, 9)] == [3, 5, 5]
    assert count(**chat, max_iterations=9, workers="8") == 11, "four of a probe beside the last one's"
    assert count(**chat, max_iterations=9, planner_calls=0) == 4
