"""A part of the blocks does what the whole model does, bit for bit, on every architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import ARCHITECTURES, SHARING, VOCABULARY, make_tiny_model
from tools.base.errors import UserError
from tools.models.blocks import Blocks, _passing_on, check_blocks
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


@pytest.mark.parametrize("architecture", SHARING)
def test_what_blocks_leave_for_later_ones_is_passed_on(architecture: str) -> None:
    model, ids = make_tiny_model(architecture), make_ids()
    blocks = Blocks(model)
    start = blocks.embed(ids)
    given = [start.requires_grad_()]
    with torch.no_grad():
        for block in range(3):
            given.append(blocks.run(ids, block, given[-1]).requires_grad_())
    assert [state.ndim == 1 for state in given] == [False, True, True, True]  # keys and values lie behind the states
    assert len(given[3]) == len(given[2]) > len(given[1]), "of one kind of block, then of both"
    with blocks.only(3, 4, ids, given[3]):
        hidden = compute_hidden(model, ids[None])
    above = torch.autograd.grad(hidden.square().sum(), given[3])
    for block in reversed(range(3)):
        above = torch.autograd.grad(blocks.run(ids, block, given[block]), given[block], above)
    with blocks.only(0, 4, ids, start):
        whole = compute_hidden(model, ids[None])
    assert torch.equal(hidden, whole) and torch.equal(whole, compute_hidden(model, ids[None]))
    [expected] = torch.autograd.grad(whole.square().sum(), start)
    torch.testing.assert_close(above[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def run_another(model: Any) -> str:
    """The second block is the first one again."""
    first, second = model.model.layers
    second.forward = lambda hidden, **inputs: first(hidden, **inputs)
    return "they do not run once each, in their order"


def need(model: Any) -> str:
    """The second block needs what the first one computed, and has it from somewhere else."""
    (first, second), seen = model.model.layers, {}
    model.register_forward_pre_hook(lambda _module, _inputs: seen.clear())
    first.mlp.register_forward_hook(lambda _module, _inputs, output: seen.update(sliding_attention=output))
    second.mlp.register_forward_hook(lambda _module, _inputs, output: output + seen.pop("sliding_attention"))
    return "KeyError: 'sliding_attention'"


def miss(model: Any) -> str:
    """Likewise, and goes without where there is nothing."""
    (first, second), seen = model.model.layers, {}
    model.register_forward_pre_hook(lambda _module, _inputs: seen.clear())
    first.mlp.register_forward_hook(lambda _module, _inputs, output: seen.update(it=output))
    second.mlp.register_forward_hook(lambda _module, _inputs, output: output + seen.pop("it", 0))
    return "what comes out is not what the model makes of the same tokens"


def look_down(model: Any) -> str:
    """The second block reads what the first one read: the same numbers, but no gradient comes that way."""
    (first, second), seen = model.model.layers, {}
    first.register_forward_hook(lambda _module, inputs, _output: seen.update(it=inputs[0]))
    second.mlp.register_forward_hook(lambda _module, _inputs, output: output + seen["it"])
    return "what flows back through them is not what flows back through the model"


def compute_without_gradients(model: Any) -> str:
    second = model.model.layers[1]
    second.forward = torch.no_grad()(second.forward)
    return "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"


@pytest.mark.parametrize("spoil", [run_another, need, miss, look_down, compute_without_gradients])
def test_blocks_that_are_not_the_model_one_by_one_are_refused(spoil: Callable[[Any], str]) -> None:
    model = make_tiny_model("llama")
    reason = spoil(model)
    with pytest.raises(UserError) as caught:
        check_blocks(Blocks(model), make_ids())
    assert str(caught.value) == (
        f"the blocks of LlamaForCausalLM cannot be run one by one ({reason}); it is not supported yet"
    )


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SHARING, "qwen3_moe"])
def test_blocks_that_are_the_model_pass(architecture: str) -> None:
    check_blocks(Blocks(make_tiny_model(architecture)), make_ids())


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
