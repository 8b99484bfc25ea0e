"""ShortGPT and SLEB against plain loops over the whole model."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuts import IDS, compute_logits, make_config, make_model
from tests.tiny import make_tiny_model
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.models.layers import find_blocks
from tools.plans.cuts import Counts
from tools.surgery.parts import Cut
from tools.surgery.published import count_eliminated, drop_least, eliminate_blocks, rank_blocks
from tools.surgery.rebuild import build_cut


def read_states(model: Any) -> list[Any]:
    """What every block reads, and what the last one gives, (windows, tokens, width), float64."""
    seen: list[torch.Tensor] = []
    blocks = find_blocks(model)
    hooks = [
        block.register_forward_hook(lambda _module, inputs, output: seen.extend([inputs[0], output]))
        for block in blocks
    ]
    compute_logits(model)
    for hook in hooks:
        hook.remove()
    return [state.double().numpy() for state in [*seen[::2], seen[-1]]]


@pytest.mark.parametrize("lead", [0, 1])
def test_block_influence_is_the_mean_change_of_direction(lead: int) -> None:
    model = make_model(make_config("llama", num_hidden_layers=4))
    states = [state[:, lead:] for state in read_states(model)]
    slow = []
    for x, y in pairwise(states):
        lengths = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
        cosines = np.divide((x * y).sum(-1), lengths, out=np.zeros_like(lengths), where=lengths > 0)  # padding is 0
        slow.append(1 - cosines.mean())
    found = rank_blocks(model, IDS, ignore_progress, lead=lead)
    np.testing.assert_allclose(found, slow, rtol=1e-5)
    assert drop_least([0.3, 0.1, 0.2, 0.1], 3) == [1, 3, 2]


def measure_nll(model: Any, lead: int) -> float:
    log_p = torch.log_softmax(compute_logits(model).double()[:, lead:-1], -1)
    return -float(log_p.gather(-1, IDS[:, lead + 1 :, None]).sum())


@pytest.mark.parametrize("lead", [0, 1])
def test_each_time_the_block_goes_without_which_the_loss_is_lowest(lead: int) -> None:
    model = make_model(make_config("llama", num_hidden_layers=5))
    dropped: list[int] = []
    for _ in range(2):
        alive = [block for block in range(5) if block not in dropped]
        losses = {
            block: measure_nll(build_cut(model, Cut(Counts(blocks=len(dropped) + 1), [], (*dropped, block))), lead)
            for block in alive[1:-1]
        }
        dropped.append(min(losses, key=losses.__getitem__))
    assert list(eliminate_blocks(model, 2, IDS, ignore_progress, lead=lead)) == dropped
    assert list(eliminate_blocks(model, 2, IDS, ignore_progress, dropped[:1], lead=lead)) == dropped[1:]
    assert list(eliminate_blocks(model, 1, IDS, ignore_progress, dropped, lead=lead)) == []
    assert count_eliminated(5, 2, IDS, lead) == (3 + 2) * IDS[:, lead:].numel()


def test_the_first_and_the_last_block_stay() -> None:
    with pytest.raises(UserError, match=r"^SLEB keeps the first and the last block: of 2 it takes no 1$"):
        list(eliminate_blocks(make_tiny_model("llama"), 1, IDS, ignore_progress))
