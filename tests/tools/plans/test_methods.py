"""The registry of methods, and that the kernels do what it says of them."""

import pytest
import torch

from billhook_kernels.methods import METHODS as KERNELS
from billhook_kernels.methods import LayerStatistics, prune_weight
from tools.plans.methods import METHODS, PROFILED


def test_every_method_is_a_kernel_and_the_other_way_round() -> None:
    assert set(METHODS) == set(KERNELS)
    for name, method in METHODS.items():
        assert name == method.name and method.sentence and not method.sentence.endswith(".")
    assert not METHODS[PROFILED].changes_survivors


@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_of_survivors_is_so(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight, moment = torch.randn(16, 24, generator=generator), inputs.T @ inputs / 200
    statistics = LayerStatistics(moment.diagonal(), torch.rand(16, generator=generator), moment)
    pruned = prune_weight(name, weight, statistics, 192, refit=False).weight_OI
    kept = pruned != 0
    assert torch.equal(pruned[kept], weight[kept]) is not METHODS[name].changes_survivors
