"""The LangChain wrappers answer what the plain functions answer, and hold the run's bounds."""

import json
from pathlib import Path

import pytest
from langchain_core.tools import BaseTool

from tests.tiny import tiny_settings
from tools.agent_tools import make_tools
from tools.allocate import ImpossiblePlan
from tools.workbench import Workbench, use_workbench


def ignore(label: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def opened(tmp_path: Path, tiny_llama: Path, workbench_closed: None) -> tuple[Workbench, dict[str, BaseTool]]:
    with use_workbench(tiny_settings(tiny_llama), tmp_path / "run", pytest.fail, ignore) as bench:
        profile = bench.profile(ignore)
        tools = make_tools(bench, profile, ignore, protect=["*.v_proj"], max_layer_sparsity=0.9)
        return bench, {tool.name: tool for tool in tools}


def test_prune_validate_restore(opened: tuple[Workbench, dict[str, BaseTool]]) -> None:
    bench, tools = opened
    before = {name: layer.weight_OI.clone() for name, layer in bench.by_name.items()}
    share = json.loads(tools["allocate_sparsity"].invoke({"sparsity": 0.3}))
    assert all(value == 0 for name, value in share["layers"].items() if name.endswith("v_proj"))
    pruned = json.loads(tools["prune_model"].invoke({"sparsity": 0.3, "recipe": {"refit": False}}))
    zeros, weights = bench.count_zeros()
    assert zeros == round(0.3 * weights)
    assert pruned["predicted_kl"] == share["predicted_kl"]
    figures = json.loads(tools["validate_model"].invoke({"checkpoint": pruned["checkpoint"]}))
    assert figures["kl"] > 0 and figures["perplexity"] > 1
    restored = json.loads(tools["restore_checkpoint"].invoke({"checkpoint": "dense"}))
    assert restored["changed_layers"] == sum(not name.endswith("v_proj") for name in before)
    assert all(bool((layer.weight_OI == before[name]).all()) for name, layer in bench.by_name.items())


def test_bad_arguments_are_refused(opened: tuple[Workbench, dict[str, BaseTool]]) -> None:
    _, tools = opened
    with pytest.raises(ValueError, match="less than 1"):
        tools["prune_model"].invoke({"sparsity": 45})
    with pytest.raises(ImpossiblePlan, match="allow at most"):
        tools["allocate_sparsity"].invoke({"sparsity": 0.95})
