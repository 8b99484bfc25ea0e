"""Fused experts run one by one as transformers runs them together, and packed as they run dense."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from billhook_kernels import native
from billhook_kernels.packed import PackedLinear
from tests.tiny import MIXTURES, VOCABULARY, make_tiny_model, make_tiny_tokenizer
from tools.base.errors import DamagedArtifact
from tools.models import packed as module
from tools.models.experts import check_experts, is_fused, run_apart
from tools.models.formats import PACKED_FILE
from tools.models.layers import find_layers
from tools.models.packed import KEY, load_packed, read_contents
from tools.models.packing import save_packed

IDS_BT = 1 + torch.arange(40)[None] % (VOCABULARY - 1)


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [*product(MIXTURES, ("eager", "grouped_mm", "batched_mm")), ("llama4_text", "eager")],
)
def test_experts_run_apart_give_what_transformers_gives(architecture: str, implementation: str) -> None:
    model = make_tiny_model(architecture)
    model.set_experts_implementation(implementation)
    check_experts(model, IDS_BT[0])
    with torch.no_grad():
        theirs = model(input_ids=IDS_BT).logits
        seen: list[int] = []
        layers = [layer for layer in find_layers(model) if layer.pool]
        hooks = [x.module.register_forward_hook(lambda _, args, y: seen.append(len(args[0]))) for x in layers]
        with run_apart(layer.module for layer in layers):
            ours = model(input_ids=IDS_BT).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    chosen = 1 if architecture == "llama4_text" else 2
    assert sum(seen) == chosen * 3 * 2 * 40, "so many experts of three projections for each token, in both blocks"
    for hook in hooks:
        hook.remove()
    assert not any("forward" in vars(part) for part in model.modules())


def make_sparse(architecture: str) -> Any:
    model = make_tiny_model(architecture)
    for layer in find_layers(model):
        layer.write(torch.where(layer.weight_OI.abs() > 0.2, layer.weight_OI, 0))
    return model


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("architecture", [*MIXTURES, "llama4_text"])
def test_packed_experts_say_what_dense_ones_say(
    architecture: str, dense: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dense and native.explain_absence(torch.float32):
        pytest.skip(native.explain_absence(torch.float32))
    model = make_sparse(architecture)
    contents = save_packed(model, make_tiny_tokenizer(), tmp_path / "packed", lambda _: "")
    assert list(contents.layers) == [layer.name for layer in find_layers(model)]
    if dense:
        monkeypatch.setattr(module, "_explain_dense", lambda *_: "this test wants it")
    loaded = load_packed(tmp_path / "packed", warn=lambda _: None)
    assert any(is_fused(part) for part in loaded.modules()) == dense
    assert sum(isinstance(part, PackedLinear) for part in loaded.modules()) == (0 if dense else len(contents.layers))
    with torch.no_grad():
        theirs, ours = model(input_ids=IDS_BT).logits, loaded(input_ids=IDS_BT).logits
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_of_stacked_experts_all_are_packed_or_none(tmp_path: Path) -> None:
    model = make_sparse("qwen3_moe")
    find_layers(model)[6].write(torch.ones(32, 16))
    contents = save_packed(model, make_tiny_tokenizer(), tmp_path / "packed", lambda _: "")
    assert {name.split(".mlp.")[0] for name in contents.layers if ".experts." in name} == {"model.layers.1"}
    assert "model.layers.0.mlp.experts.down_proj" in contents.tensors


def test_a_packed_model_without_one_of_its_experts_is_refused(tmp_path: Path) -> None:
    save_packed(make_sparse("qwen3_moe"), make_tiny_tokenizer(), tmp_path, lambda _: "")
    contents, tensors = read_contents(tmp_path), load_file(tmp_path / PACKED_FILE)
    name = "model.layers.1.mlp.experts.2.up_proj"
    del contents.layers[name], tensors[f"{name}.mask"], tensors[f"{name}.values"]
    save_file(tensors, tmp_path / PACKED_FILE, {KEY: json.dumps(contents.model_dump())})
    with pytest.raises(DamagedArtifact, match=r"some of its experts are packed, and others that are stacked with them"):
        load_packed(tmp_path)
