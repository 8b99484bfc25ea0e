"""Prunable layers of several architectures: the right ones, once each, and views that write through."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.tiny import ARCHITECTURES, BLOCKS, MIXTURES, make_tiny_model
from tools.base.errors import UserError
from tools.models.layers import find_blocks, find_layers, measure_reach, refuse_small_reach

GATED = [
    *(f"self_attn.{kind}_proj" for kind in ("q", "k", "v", "o")),
    *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
]
EXPECTED = {
    "llama": ("model.layers", GATED),
    "qwen3": ("model.layers", GATED),
    "gemma3": ("model.layers", GATED),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "opt": (
        "model.decoder.layers",
        [*(f"self_attn.{kind}" for kind in ("k_proj", "v_proj", "q_proj", "out_proj")), "fc1", "fc2"],
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_of_every_block_is_found(architecture: str) -> None:
    model = make_tiny_model(architecture)
    prefix, kinds = EXPECTED[architecture]
    layers = find_layers(model)
    assert [(layer.name, layer.block, layer.kind) for layer in layers] == [
        (f"{prefix}.{block}.{kind}", block, kind) for block in range(BLOCKS) for kind in kinds
    ]
    parameters = dict(model.named_parameters())
    for layer in layers:  # the file knows the weight by this name
        assert parameters[f"{layer.name}.weight"].data_ptr() == layer.stored_weight.data_ptr()
    reach = measure_reach(model, layers)
    assert reach.dense == [] and reach.of_blocks == 1
    assert reach.model == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_output_by_input_views(architecture: str) -> None:
    model = make_tiny_model(architecture)
    for layer in find_layers(model):
        x = torch.randn(1, 2, layer.weight_OI.shape[1])
        bias = layer.module.bias
        expected = x @ layer.weight_OI.T
        if isinstance(bias, Tensor):
            expected = expected + bias
        torch.testing.assert_close(layer.module(x), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_writing_goes_into_the_model_in_place(architecture: str) -> None:
    model = make_tiny_model(architecture)
    layer = find_layers(model)[3]
    parameter = layer.module.get_parameter("weight")
    address = parameter.data_ptr()
    new = torch.randn(layer.weight_OI.shape)
    layer.write(new)
    assert torch.equal(layer.weight_OI, new)
    assert layer.module.get_parameter("weight") is parameter and parameter.data_ptr() == address
    stored = new.T if isinstance(layer.module, Conv1D) else new
    assert torch.equal(layer.stored_weight, stored)


def test_writing_works_on_weights_that_want_gradients() -> None:
    model = make_tiny_model("llama").requires_grad_(True)
    layer = find_layers(model)[0]
    layer.write(torch.zeros_like(layer.weight_OI))
    assert not layer.stored_weight.any()
    assert layer.module.get_parameter("weight").requires_grad


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)


class Decoder(nn.Module):
    blocks: Any

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.before = nn.Linear(100, 6)  # outside the blocks, however large
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))


def test_tied_weights_are_pruned_once() -> None:
    model = Decoder(3)
    model.blocks[1].first.weight = model.blocks[0].first.weight
    model.blocks[2] = model.blocks[0]
    names = [layer.name for layer in find_layers(model)]
    assert names == ["blocks.0.first", "blocks.0.second", "blocks.1.second"]
    assert measure_reach(model, find_layers(model)).dense == []


def test_blocks_are_the_outermost_list() -> None:
    model = Decoder(2)
    for block in model.blocks:
        block.experts = nn.ModuleList(nn.Linear(6, 60) for _ in range(4))
    assert find_blocks(model) is model.blocks
    assert [layer.kind for layer in find_layers(model)[:3]] == ["first", "second", "experts.0"]


def test_one_block_with_everything_in_an_inner_list() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    assert [layer.name for layer in find_layers(model)] == ["blocks.0.experts.0", "blocks.0.experts.1"]


@pytest.mark.parametrize("architecture", MIXTURES)
def test_fused_experts_are_layers_whose_weights_are_views(architecture: str) -> None:
    model = make_tiny_model(architecture)
    layers, router = find_layers(model), "router" if architecture == "gpt_oss" else "gate"
    names = [f"{expert}.{part}_proj" for expert in range(4) for part in ("gate", "up", "down")]
    assert [layer.name for layer in layers[4:16]] == [f"model.layers.0.mlp.experts.{name}" for name in names]
    assert {layer.kind for layer in layers} == {*GATED[:4], *(f"mlp.experts.{p}_proj" for p in ("gate", "up", "down"))}
    assert layers[6].pool == "model.layers.0.mlp.experts.*.down_proj" and not layers[0].pool

    stacked = dict(model.named_parameters())
    for layer in layers[4:16]:
        layer.write(torch.full_like(layer.weight_OI, 3.0))
    for name in ("gate_up_proj", "down_proj"):
        assert bool((stacked[f"model.layers.0.mlp.experts.{name}"] == 3).all())
        assert not bool((stacked[f"model.layers.1.mlp.experts.{name}"] == 3).any())

    reach = measure_reach(model, layers)
    matrices = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 4 * 3 * 16 * 32)
    assert reach[:2] == (matrices, matrices + 2 * 4 * 32)
    assert reach.dense == [f"model.layers.*.mlp.{router}.weight"]


def test_linear_layers_that_choose_experts_are_none_to_prune() -> None:
    model = Decoder(2)
    for block in model.blocks:
        block.moe = nn.Module()
        block.moe.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        block.moe.router = nn.Linear(6, 3)
    layers = find_layers(model)
    assert [layer.kind for layer in layers if layer.block][2:] == [f"moe.experts.{i}" for i in range(3)]
    assert {layer.pool for layer in layers if layer.block} == {"", "blocks.1.moe.experts.*"}
    assert measure_reach(model, layers).dense == ["blocks.*.moe.router.weight"]


class Stack(nn.Module):
    """Experts of a kind that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(4, 6, 6))


def test_a_model_of_which_little_can_be_pruned_is_refused_unless_that_is_meant() -> None:
    model = Decoder(2)
    for block in model.blocks:
        block.experts = Stack()
    reach = measure_reach(model, find_layers(model))
    assert reach == (144, 432, 432 + 600 + 6 + 24, ["blocks.*.experts.stack"])
    with pytest.raises(UserError) as refused:
        refuse_small_reach(reach, partial=False)
    assert str(refused.value) == (
        "only 33.3% of the weights in the model's blocks can be pruned (13.6% of the whole model), not "
        "blocks.*.experts.stack; --partial prunes that share and leaves the rest dense"
    )
    refuse_small_reach(reach, partial=True)
    refuse_small_reach(reach._replace(prunable=216), partial=False)  # half


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        nn.ModuleDict({"blocks": nn.ModuleList([nn.LayerNorm(3), nn.Embedding(3, 3)])}),
        nn.ModuleDict({"blocks": nn.ModuleList()}),
    ],
)
def test_a_model_without_prunable_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"^the model has no prunable linear layers inside decoder blocks$"):
        find_layers(model)
