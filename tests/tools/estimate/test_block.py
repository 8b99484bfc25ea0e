"""One block of each kind: what is built, and that what is counted without memory is what real tensors take."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny import ARCHITECTURES, make_tiny_config, make_tiny_model, save_tiny_gguf, tiny_settings
from tests.tools.estimate.helpers import MODEL, QWEN3_8B, write_config
from tools.base.errors import UserError
from tools.estimate import block as module
from tools.estimate.block import build_empty, build_sample, count_block, count_kinds, only_head
from tools.estimate.meter import Meter
from tools.models.blocks import Blocks
from tools.models.readout import CHUNK, compute_logits, hidden_gradients, measure_losses
from tools.statistics.walk import Walk
from tools.statistics.walks import Walks


def make_empty(architecture: str, **changes: Any) -> Any:
    """A tiny model on the meta device."""
    config = make_tiny_config(architecture)
    for name, value in changes.items():
        setattr(config, name, value)
    model = type(make_tiny_model(architecture))
    with torch.device("meta"):
        return model(config).eval().requires_grad_(False)


# --- the model of few blocks -----------------------------------------------------------------------------------


def test_blocks_alike_are_one_kind() -> None:
    assert count_kinds(make_empty("llama", num_hidden_layers=5)) == [(0, 5)]
    assert count_kinds(make_empty("gpt2")) == [(0, 2)]
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    mixed = make_empty("gemma3", num_hidden_layers=4, layer_types=kinds)
    assert count_kinds(mixed) == [(0, 3), (2, 1)]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3_moe", "llama4_text"])
def test_a_sample_runs_as_a_model_does(architecture: str, tmp_path: Path) -> None:
    model = make_empty(architecture)
    before = [(name, parameter.device.type) for name, parameter in model.named_parameters()]
    sample = build_sample(model, "cpu")
    assert [(name, parameter.device.type) for name, parameter in model.named_parameters()] == before
    kinds = len(sample.counts)
    assert (sum(sample.counts), len(sample.blocks), sample.words) == (2, kinds + 1, 1.0)
    assert {layer.block for layer in sample.layers} == set(range(kinds))
    assert [len(sample.members(kind)) for kind in range(kinds)] == [len(sample.layers) // kinds] * kinds

    ids_T = torch.arange(16)
    x_BTD = sample.blocks.embed(ids_T)
    assert torch.equal(sample.blocks.run(ids_T, kinds, x_BTD), x_BTD), "the last one hands its input on"
    with only_head(sample, ids_T) as hidden_TD:
        assert hidden_TD.shape == (16, 32)
        assert torch.equal(sample.model(input_ids=ids_T[None]).logits[0], compute_logits(sample.model, hidden_TD))
    assert not torch.equal(sample.blocks.run(ids_T, 0, x_BTD), x_BTD)
    assert bool(torch.isfinite(sample.model(input_ids=ids_T[None]).logits).all())

    walks, walk = Walks(sample.blocks, sample.layers, ids_T[None], 1, 0, tmp_path), Walk(0, "run")
    for index in range(kinds + 1):
        walks.moments((0, 1), walk, index, True, "profile")
    assert walks.gradients((0, 1), walk, kinds) == [((0, 1), {})], "no layer is in the last one"
    found = {name for _, sums in walks.gradients((0, 1), walk, 0) for name in sums}
    missing = [layer for layer in sample.members(0) if f"plain/{layer.name}" not in found]
    assert all(layer.pool for layer in missing), "no token need be sent to an expert of random weights"
    assert len(missing) < sum(bool(layer.pool) for layer in sample.members(0)) or not missing


def test_a_block_that_returns_a_tuple_is_handed_on_as_one() -> None:
    config = transformers.AutoConfig.for_model("bloom", vocab_size=320, hidden_size=32, n_layer=2, n_head=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    sample = build_sample(model, "cpu")
    assert sample.model(input_ids=torch.arange(16)[None]).logits.shape == (1, 16, 320)
    assert count_block(model, 64).forward > 0


def test_tied_weights_stay_one_and_a_great_vocabulary_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORDS", 80)
    sample = build_sample(make_empty("llama"), "cpu")
    head, embedding = sample.model.get_output_embeddings(), sample.model.get_input_embeddings()
    assert (sample.words, tuple(head.weight.shape), tuple(embedding.weight.shape)) == (4.0, (80, 32), (80, 32))


# --- what is counted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_block_holds_what_was_counted(architecture: str, dtype: torch.dtype) -> None:
    config = make_tiny_config(architecture)
    model = type(make_tiny_model(architecture))(config).to(dtype).eval().requires_grad_(False)
    counts = count_block(make_empty(architecture).to(dtype), 256)
    blocks, ids_T = Blocks(model), torch.randint(0, 320, (256,), generator=torch.Generator().manual_seed(0))
    x_BTD = blocks.embed(ids_T).clone()
    forward, graph = Meter(), Meter()
    with forward, torch.no_grad():
        blocks.run(ids_T, 0, x_BTD)
    assert 0.6 * counts.forward_bytes < forward.peak <= counts.forward_bytes
    x_BTD.requires_grad_()
    with graph:
        y_BTD = blocks.run(ids_T, 0, x_BTD)
        torch.autograd.grad(y_BTD, x_BTD, torch.ones_like(y_BTD))
    assert 0.6 * counts.graph_bytes < graph.peak <= counts.graph_bytes
    assert (counts.forward, counts.backward) == (2 * forward.flops, 2 * (graph.flops - forward.flops))


def test_a_chunk_of_logits_holds_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORDS", 2000)
    counts = count_block(make_empty("llama", vocab_size=8000), 2 * CHUNK)
    config = make_tiny_config("llama")
    config.vocab_size = 8000
    model = type(make_tiny_model("llama"))(config).eval().requires_grad_(False)
    ids_T = torch.randint(0, 320, (CHUNK,), generator=torch.Generator().manual_seed(0))
    hidden_TD = torch.randn(CHUNK, 32)
    losses, readout = Meter(), Meter()
    with losses:
        measure_losses(model, ids_T, hidden_TD)
    with readout:
        hidden_gradients(model, ids_T, hidden_TD, torch.Generator())
    assert losses.peak == pytest.approx(counts.loss_bytes, rel=0.05)
    assert readout.peak == pytest.approx(counts.readout_bytes, rel=0.05)
    assert counts.head == 2 * (2 * CHUNK) * 8000 * 32


def test_experts_that_torch_knows_in_bf16_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """Their grouped products have no shapes in fp32: what holds fp32 is counted as twice what holds bf16."""
    model = make_empty("qwen3_moe")
    wide, narrow = count_block(model, 64), count_block(model.to(torch.bfloat16), 64)
    assert (wide.forward_bytes, wide.graph_bytes) == (2 * narrow.forward_bytes, 2 * narrow.graph_bytes)
    assert wide.forward == narrow.forward > 0
    assert capfd.readouterr() == ("", ""), "torch says much of what it has no shapes for"


def test_a_block_that_cannot_be_counted_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> Any:
        raise RuntimeError("no shape\nis known")

    monkeypatch.setattr(module, "_count_forward", fail)
    with pytest.raises(UserError) as caught:
        count_block(make_empty("llama"), 64)
    assert str(caught.value) == "one block of the model could not be run on shapes alone: no shape is known"


def test_a_large_model_is_counted_without_its_memory(tmp_path: Path) -> None:
    model, _ = build_empty(tiny_settings(write_config(tmp_path / "qwen3-8b", QWEN3_8B), dtype="bf16"))
    counts = count_block(model, 2048)
    weights = 36 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    attention = 36 * 2 * 2 * 2048 * 2048 * 4096
    assert counts.forward == 2 * 2048 * weights + attention
    assert counts.head == 2 * 2048 * 151936 * 4096
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# --- where the config comes from -------------------------------------------------------------------------------


def test_a_config_alone_says_the_same_as_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    directory = write_config(tmp_path / "shape", json.loads((tiny_llama / "config.json").read_text()))
    whole, reading = build_empty(tiny_settings(tiny_llama))
    for source in (directory, directory / "config.json"):
        model, same = build_empty(tiny_settings(source))
        shapes = [[(name, p.shape, p.dtype) for name, p in x.named_parameters()] for x in (model, whole)]
        assert shapes[0] == shapes[1] and same == reading == 0
    _, converted = build_empty(tiny_settings(directory, dtype="bf16"))
    assert converted == MODEL, "the file is fp32"


def test_a_gguf_file_is_not_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")

    def refuse(*_arguments: Any) -> Any:
        raise AssertionError("weights are being read")

    monkeypatch.setattr("gguf.dequantize", refuse)
    model, reading = build_empty(tiny_settings(path))
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_760
    assert reading == path.stat().st_size + 320 * 32 * 4


def test_no_memory_is_taken_for_weights(tmp_path: Path) -> None:
    config = QWEN3_8B | {"hidden_size": 65536, "num_hidden_layers": 100}  # 1.5e12 parameters
    model, _ = build_empty(tiny_settings(write_config(tmp_path / "huge", config)))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_broken_file_is_not_asked_for_more_than_its_config(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"")
    assert build_empty(tiny_settings(tmp_path / "broken"))[1] == 0
