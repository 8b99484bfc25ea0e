"""A part of the blocks does what the whole model does, bit for bit, on every architecture."""

import pytest
import torch
from torch import Tensor

from tests.tiny import ARCHITECTURES, VOCABULARY, make_tiny_model
from tools.models.blocks import Blocks, _passing_on
from tools.models.readout import compute_hidden

LENGTH = 24


def make_ids(length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3_moe"])
@torch.no_grad()
def test_blocks_one_after_another_are_the_model(architecture: str) -> None:
    model, ids = make_tiny_model(architecture), make_ids()
    blocks = Blocks(model)
    whole = compute_hidden(model, ids[None])
    states = [blocks.embed(ids)]
    for block in range(len(blocks)):
        states.append(blocks.run(ids, block, states[-1]))
    with blocks.only(1, 2, ids, states[1]) as boundary:
        assert torch.equal(compute_hidden(model, ids[None]), whole)
    assert torch.equal(boundary[1], states[1]) and torch.equal(boundary[2], states[2])
    assert torch.equal(compute_hidden(model, ids[None]), whole), "the model is whole again"


@torch.no_grad()
def test_all_boundaries_of_a_run_are_seen() -> None:
    model, ids = make_tiny_model("llama"), make_ids()
    blocks = Blocks(model)
    with blocks.only(0, len(blocks), ids) as boundary:
        compute_hidden(model, ids[None])
    assert sorted(boundary) == [0, 1, 2]
    assert torch.equal(boundary[1], blocks.run(ids, 0, blocks.embed(ids)))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_gradients_walk_back_through_the_blocks(architecture: str) -> None:
    model, ids = make_tiny_model(architecture), make_ids()
    blocks = Blocks(model)
    start = blocks.embed(ids).requires_grad_()
    with blocks.only(0, 2, ids, start):
        compute_hidden(model, ids[None]).square().sum().backward()
    middle = blocks.run(ids, 0, start.detach()).detach().requires_grad_()
    with blocks.only(1, 2, ids, middle):
        compute_hidden(model, ids[None]).square().sum().backward()
    again = start.detach().requires_grad_()
    blocks.run(ids, 0, again).backward(middle.grad)
    assert start.grad is not None and again.grad is not None
    torch.testing.assert_close(again.grad, start.grad, rtol=1e-4, atol=1e-5 * float(start.grad.abs().max()))


def test_a_block_that_returns_a_tuple_passes_its_input_on_in_one() -> None:
    block, hidden = torch.nn.Linear(4, 4), torch.ones(1, 2, 4)
    with _passing_on(block, 3):
        assert block(hidden)[0] is hidden and block(hidden)[1:] == (None, None)
    with _passing_on(block, None):
        assert block(hidden) is hidden
    plain = block.forward = lambda x: -x
    with _passing_on(block, None):
        assert block(hidden) is hidden
    assert block.forward is plain, "what was patched before is patched again"


def test_the_model_is_whole_after_an_error() -> None:
    model, ids = make_tiny_model("llama"), make_ids()
    blocks = Blocks(model)
    with pytest.raises(RuntimeError, match="stop"), blocks.only(0, 1, ids):
        raise RuntimeError("stop")
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
