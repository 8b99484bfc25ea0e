"""The gradient of KL(dense || pruned), block by block, beside plain autograd on the whole model in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import VOCABULARY, make_tiny_model
from tools.models.blocks import Blocks
from tools.models.layers import Layer, find_layers
from tools.models.readout import compute_hidden
from tools.polish.gradients import KL, Divergence, Survivors
from tools.statistics.shards import join_nodes, list_nodes, sum_node

WINDOWS = torch.randint(1, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(1))


def prune_at_random(layers: list[Layer], share: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(2)
    for layer in layers:
        keep_OI = torch.rand(layer.weight_OI.shape, generator=generator) > share
        layer.write(layer.weight_OI * keep_OI)


def begin(dense: Any, pruned: Any, lead: int = 0, layers: list[Layer] | None = None) -> Divergence:
    with torch.no_grad():
        hidden = {i: compute_hidden(dense, ids_T[None])[0] for i, ids_T in enumerate(WINDOWS)}
    survivors = Survivors(find_layers(pruned) if layers is None else layers)
    return Divergence(Blocks(pruned), survivors, WINDOWS, hidden, lead)


def differentiate_whole(dense: Any, pruned: Any, lead: int = 0) -> tuple[float, dict[str, Tensor]]:
    """The same by one backward of the whole model, all of it in float64: (KL, gradients (O, I) by layer)."""
    dense, pruned = copy.deepcopy(dense).double(), copy.deepcopy(pruned).double()
    dense.config._experts_implementation = pruned.config._experts_implementation = "eager"  # float64 has no other
    layers = find_layers(pruned)
    for layer in layers:
        layer.parameter.requires_grad_()
    kl = torch.zeros((), dtype=torch.float64)
    for ids_T in WINDOWS:
        with torch.no_grad():
            log_q = torch.log_softmax(dense(ids_T[None]).logits[0, lead:], -1)
        log_p = torch.log_softmax(pruned(ids_T[None]).logits[0, lead:], -1)
        kl = kl + (log_q.exp() * (log_q - log_p)).sum()
    kl.backward()
    for parameter in {id(layer.parameter): layer.parameter for layer in layers}.values():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # read through the layers, whatever way they lie in it
    return float(kl.detach()), {layer.name: layer.weight_OI for layer in layers}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gemma3n", "opt", "mixtral"])
def test_it_is_that_of_the_whole_model_in_float64(architecture: str) -> None:
    dense, pruned = make_tiny_model(architecture), make_tiny_model(architecture)
    layers = find_layers(pruned)
    prune_at_random(layers)
    problem = begin(dense, pruned, lead=1)
    sums = problem.differentiate([0, 1, 2])
    kl, expected = differentiate_whole(dense, pruned, lead=1)
    assert float(sums.pop(KL)) == pytest.approx(kl, rel=1e-4)
    assert problem.count_tokens([0, 1, 2]) == 27
    assert problem.measure([0, 1, 2]) == pytest.approx(kl / 27, rel=1e-4)
    for layer in layers:
        gradient_S = expected[layer.name][layer.weight_OI != 0]
        found_S = sums.get(layer.name, torch.zeros_like(gradient_S))
        assert found_S.shape == gradient_S.shape
        assert float((found_S - gradient_S).abs().max()) <= 2e-4 * float(gradient_S.abs().max()), layer.name


def test_a_weight_that_is_tied_gets_what_flows_back_through_all_its_uses() -> None:
    def tie(model: Any) -> Any:
        first, second = model.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight  # in another block
        first.mlp.gate_proj.weight = first.mlp.up_proj.weight  # in the same one
        return model

    dense, pruned = tie(make_tiny_model("llama")), tie(make_tiny_model("llama"))
    layers = find_layers(pruned)
    assert len(layers) == 14 - 2
    prune_at_random(layers)
    sums = begin(dense, pruned).differentiate([0, 1, 2])
    _, expected = differentiate_whole(dense, pruned)
    for layer in layers:
        gradient_S = expected[layer.name][layer.weight_OI != 0]
        assert float((sums[layer.name] - gradient_S).abs().max()) <= 2e-4 * float(gradient_S.abs().max()), layer.name


def test_layers_that_are_left_out_have_none_and_blocks_below_all_others_are_not_gone_through() -> None:
    dense, pruned = make_tiny_model("llama"), make_tiny_model("llama")
    layers = find_layers(pruned)
    prune_at_random(layers)
    whole = begin(dense, pruned).differentiate([0])
    some = [layer for layer in layers if layer.block == 1 and "mlp" in layer.name]
    sums = begin(dense, pruned, layers=some).differentiate([0])
    assert set(sums) == {KL, *(layer.name for layer in some)}
    assert all(torch.equal(sums[name], whole[name]) for name in sums)


def test_sums_are_those_of_one_tree_whoever_makes_which_part() -> None:
    dense, pruned = make_tiny_model("llama"), make_tiny_model("llama")
    prune_at_random(find_layers(pruned))
    problem = begin(dense, pruned)
    whole = problem.differentiate([2, 0, 1])
    tree = (0, 3)
    nodes = [node for span in ((0, 2), (2, 3)) for node in list_nodes(tree, span)]
    known = {node: sum_node(node, lambda place: problem.differentiate([[2, 0, 1][place]])) for node in nodes}
    joined = join_nodes(tree, known)
    assert joined.keys() == whole.keys() and all(torch.equal(joined[name], whole[name]) for name in whole)
