"""Weights of tokens and the second moments that are made with them, beside plain loops in float64."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from billhook_kernels.statistics import weigh_tokens
from tests.tiny import ARCHITECTURES, BLOCKS, make_tiny_model
from tests.tools.statistics.test_collect import BACKWARD, LENGTH, SEED, WINDOWS, make_windows, plain_gradients
from tools.base.errors import UnknownStatistics
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.statistics.collect import collect_moments
from tools.statistics.extent import begin_walk, work_alone
from tools.statistics.flow import CLIP
from tools.statistics.walk import Walk
from tools.statistics.walks import Walks
from tools.statistics.weights import weigh_block

SCRATCH = Path(tempfile.gettempdir())


def weigh(size_N: np.ndarray) -> np.ndarray:
    """The definition: clipped at ten times the median (the lower one of an even number), mean one."""
    limit = CLIP * sorted(size_N)[(len(size_N) - 1) // 2]
    clipped = [min(size, limit) for size in size_N]
    return np.array([size / (sum(clipped) / len(clipped)) for size in clipped])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_token_weighs_as_its_gradient_at_the_layers_own_output_says(architecture: str) -> None:
    model = make_tiny_model(architecture)
    layers = find_layers(model)
    passed = [plain_gradients(model, window) for window in range(WINDOWS)]  # of all windows, not of BACKWARD alone
    assert BACKWARD < WINDOWS
    team, extent = work_alone(Blocks(model), layers, make_windows(), BACKWARD, SEED, SCRATCH)
    found: dict[str, Tensor] = {}
    with begin_walk(team, every=True) as walk:
        for block in reversed(range(BLOCKS)):
            found |= weigh_block(team, extent, walk, block, [layer for layer in layers if layer.block == block])
    assert found.keys() == {layer.name for layer in layers}
    for block in range(BLOCKS):
        members = [layer for layer in layers if layer.block == block]
        moments = collect_moments(team, extent, Walk(9, "run"), block, members, weights=found)
        even = collect_moments(team, extent, Walk(9, "run"), block, members)
        assert moments.group == even.group and moments.second_moment.keys() == {layer.name for layer in members}
        for layer in members:
            x_TI = torch.cat([inputs[layer.name] for inputs, _ in passed])
            g_TO = torch.cat([gradients[layer.name] for _, gradients in passed])
            weights = weigh(np.array([float(sum(value**2 for value in g_O.tolist())) for g_O in g_TO]))
            np.testing.assert_allclose(found[layer.name].flatten().numpy(), weights, rtol=2e-3, atol=1e-5)
            total_II = torch.zeros(x_TI.shape[1], x_TI.shape[1], dtype=torch.float64)
            for weight, x_I in zip(weights, x_TI, strict=True):
                total_II += float(weight) * torch.outer(x_I, x_I)
            expected_II = total_II / (WINDOWS * LENGTH)
            close = {"rtol": 2e-3, "atol": 1e-4 * float(expected_II.abs().max())}
            torch.testing.assert_close(moments.second_moment[layer.name].double(), expected_II, **close)
            leader = moments.group[layer.name]
            torch.testing.assert_close(moments.mean_square[leader], even.mean_square[leader], rtol=1e-5, atol=1e-7)


def test_a_token_weighs_no_more_than_ten_times_the_median_one() -> None:
    sizes = torch.tensor([1.0, 2.0, 3.0, 400.0])
    torch.testing.assert_close(weigh_tokens(sizes, 10.0), torch.tensor([1.0, 2.0, 3.0, 20.0]) / 6.5)
    assert torch.equal(weigh_tokens(torch.zeros(4), 10.0), torch.ones(4))
    assert torch.equal(weigh_tokens(torch.tensor([0.0, 0.0, 0.0, 5.0]), 10.0), torch.ones(4)), "the median is nothing"


def test_gradients_of_a_later_walk_are_of_the_gradient_windows_again() -> None:
    model = make_tiny_model("llama")
    walks = Walks(Blocks(model), find_layers(model), make_windows(), BACKWARD, SEED, SCRATCH)
    span = (0, WINDOWS)
    before = walks.gradients(span, Walk(0, "run"), 0)
    sizes = walks.token_sizes(span, Walk(1, "run", True), 0)
    assert {name: sorted(windows) for name, windows in sizes.items()} == {
        layer.name: list(range(WINDOWS)) for layer in find_layers(model) if layer.block == 0
    }
    after = walks.gradients(span, Walk(2, "run"), 0)
    assert all(torch.equal(before[0][1][name], after[0][1][name]) for name in before[0][1])


def test_gradients_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model("llama")
    layers = [layer for layer in find_layers(model) if layer.block == 0]
    team, extent = work_alone(Blocks(model), layers, make_windows(), BACKWARD, SEED, SCRATCH)
    sizes = dict.fromkeys(range(WINDOWS), torch.full((LENGTH,), torch.inf))
    monkeypatch.setattr(Walks, "token_sizes", lambda *_: {layer.name: sizes for layer in layers})
    said = "^gradients of model.layers.0.self_attn.q_proj are not finite; try --dtype fp32 or bf16$"
    with begin_walk(team, every=True) as walk, pytest.raises(UnknownStatistics, match=said):
        weigh_block(team, extent, walk, 0, layers)
