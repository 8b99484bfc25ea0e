"""Walks: whoever takes a span over in the middle of one answers as if he had been there from the beginning."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import BLOCKS, VOCABULARY, make_tiny_model
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.statistics.passage import Walk
from tools.statistics.shards import Span
from tools.statistics.walks import Walks

WINDOWS, GRADIENT = 9, 5
WALK, OTHER = Walk(0, "run"), Walk(1, "run")


def begin(ahead: int = 0, architecture: str = "llama") -> Walks:
    model = make_tiny_model(architecture)
    windows = torch.randint(0, VOCABULARY, (WINDOWS, 12), generator=torch.Generator().manual_seed(1))
    return Walks(Blocks(model), find_layers(model), windows, GRADIENT, 3, Path(tempfile.gettempdir()), ahead)


def same(left: Any, right: Any) -> bool:
    pairs = zip(left, right, strict=True)
    return all(
        a_node == b_node and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for (a_node, a), (b_node, b) in pairs
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_moments_of_a_later_block_need_no_earlier_request(architecture: str) -> None:
    span: Span = (2, 5)
    walked, fresh = begin(0, architecture), begin(0, architecture)
    for block in range(BLOCKS):
        nodes, group = walked.moments(span, WALK, block, True, "profile")
    others, other_group = fresh.moments(span, WALK, BLOCKS - 1, True, "profile")
    assert same(nodes, others) and group == other_group
    again, _ = walked.moments(span, WALK, 0, True, "profile")  # one block back is a new beginning
    assert same(again, begin(0, architecture).moments(span, WALK, 0, True, "profile")[0])


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_gradients_and_curves_of_a_lower_block_need_no_earlier_request(architecture: str) -> None:
    span: Span = (0, 8)
    walked = begin(1, architecture)
    for block in range(BLOCKS):
        walked.moments(span, WALK, block, False, "profile")
    known = {
        layer.name: (torch.empty(0), torch.ones(layer.weight_OI.shape[1]), torch.ones(layer.weight_OI.shape[0]))
        for layer in find_layers(walked.blocks.model)
    }
    top, bottom = walked.gradients(span, WALK, 1), walked.gradients(span, WALK, 0)
    curves = walked.mask_curves(span, WALK, 1, known), walked.mask_curves(span, WALK, 0, known)
    fresh = begin(1, architecture)
    assert same(fresh.gradients(span, WALK, 0), bottom) and same(fresh.gradients(span, WALK, 1), top)
    assert same(begin(0, architecture).mask_curves(span, WALK, 0, known), curves[1])
    assert same(begin(0, architecture).mask_curves(span, WALK, 1, known), curves[0])


def test_a_walk_goes_on_where_it_was_once_another_has_passed() -> None:
    walked, embedded = begin(), []
    embed = walked.blocks.embed
    walked.blocks.embed = lambda ids_T: embedded.append(1) or embed(ids_T)  # type: ignore[method-assign]
    first, _ = walked.moments((0, 8), WALK, 0, True, "moments")
    between = walked.gradients((0, 8), OTHER, 0)
    count = len(embedded)
    second, _ = walked.moments((0, 8), WALK, 1, True, "moments")
    assert len(embedded) == count, "no window began anew"
    fresh = begin()
    assert same(fresh.moments((0, 8), WALK, 0, True, "moments")[0], first)
    assert same(fresh.moments((0, 8), WALK, 1, True, "moments")[0], second)
    assert same(begin().gradients((0, 8), WALK, 0), between)


def test_blocks_that_change_before_the_text_passes_them() -> None:
    """As in pruning in order: moments with a block's old weights, and what follows with its new ones."""
    walked = begin()
    layers = find_layers(walked.blocks.model)
    before, _ = walked.moments((0, 8), WALK, 0, True, "pruning")
    for layer in layers:
        if layer.block == 0:
            layer.write(0.5 * layer.weight_OI)
    after, _ = walked.moments((0, 8), WALK, 1, True, "pruning")
    fresh = begin()
    assert same(fresh.moments((0, 8), WALK, 0, True, "moments")[0], before)
    for layer in find_layers(fresh.blocks.model):
        if layer.block == 0:
            layer.write(0.5 * layer.weight_OI)
    assert same(fresh.moments((0, 8), OTHER, 1, True, "moments")[0], after)
