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
from tools.workbench.open import close_workbench


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


@pytest.mark.parametrize("device", ["cpu", "stream"])
def test_it_is_checked_once_in_a_directory(
    device: str, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards, forward = list[int](), LlamaModel.forward

    def count(self: Any, **inputs: Any) -> Any:
        forwards.append(1)
        return forward(self, **inputs)

    monkeypatch.setattr(LlamaModel, "forward", count)
    model, run = save_tiny_model(tmp_path / "model", "llama"), tmp_path / "run"
    settings = tiny_settings(model, device=device)
    first = [layer.name for layer in open_bench(settings, run).weights.layers]
    assert forwards
    for again in (settings, tiny_settings(model, device=device, validation_windows=2)):
        close_workbench()
        forwards.clear()
        assert [layer.name for layer in open_bench(again, run).weights.layers] == first and not forwards
    open_bench(tiny_settings(model, device=device, dtype="bf16"), run)
    assert forwards, "in another number format it may be no chain of its blocks"
    forwards.clear()
    monkeypatch.setattr("importlib.metadata.version", lambda _package: "another")
    close_workbench()
    open_bench(settings, run)
    assert forwards, "by another version of what runs it, too"
    forwards.clear()
    close_workbench()
    save_tiny_model(model, "llama", num_hidden_layers=1)
    with pytest.raises(UserError, match="is another than when this was begun, by the same name"):
        open_bench(settings, run)
    assert forwards, "what has other layers is another model, whatever it is called"


def test_what_stays_dense_is_warned_of_again(tmp_path: Path, workbench_closed: None) -> None:
    settings, seen = tiny_settings(save_tiny_model(tmp_path / "model", "qwen3_moe")), list[str]()
    open_bench(settings, tmp_path / "run", seen.append)
    close_workbench()
    open_bench(settings, tmp_path / "run", seen.append)
    assert seen[0] == seen[1] and len(seen) == 2


def test_a_disk_too_small_is_refused_at_once(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(
        UserError, match=r"^the disk is full: a run of this model may write 0.0 GB to .*/run, but 0.0 GB"
    ):
        open_bench(tiny_settings(tiny_llama), tmp_path / "run")
