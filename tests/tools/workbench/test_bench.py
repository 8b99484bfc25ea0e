"""What is seen of a model when it is opened."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaModel

from tests.benches import open_bench
from tests.tiny import save_tiny_model, tiny_settings
from tools.base.errors import UserError
from tools.workbench.bench import Workbench


def test_memory_is_counted(bench: Workbench) -> None:
    assert 10e6 < bench.peak_memory_bytes() < 1e12


def test_what_stays_dense_is_warned_of(tmp_path: Path, workbench_closed: None) -> None:
    seen: list[str] = []
    open_bench(tiny_settings(save_tiny_model(tmp_path / "model", "qwen3_moe")), tmp_path / "run", seen.append)
    assert seen == [
        "1.37% of the weights in the blocks are no linear layers to prune, and stay dense: "
        "model.layers.*.mlp.gate.weight"
    ]


def test_a_model_that_is_not_the_chain_of_its_blocks_is_refused(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaModel.forward

    def loop(self: Any, **inputs: Any) -> Any:
        return forward(self, inputs_embeds=forward(self, **inputs).last_hidden_state)

    monkeypatch.setattr(LlamaModel, "forward", loop)
    with pytest.raises(UserError, match=r"^the blocks of LlamaForCausalLM cannot be run one by one \(they do not run"):
        open_bench(tiny_settings(tiny_llama), tmp_path / "run")


def test_a_disk_too_small_is_refused_at_once(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(
        UserError, match=r"^the disk is full: a run of this model may write 0.0 GB to .*/run, but 0.0 GB"
    ):
        open_bench(tiny_settings(tiny_llama), tmp_path / "run")
