"""Live tensors and products are counted exactly, real ones and fake ones alike."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.estimate.meter import Meter


def test_the_peak_is_of_tensors_that_live_at_once() -> None:
    given = torch.ones(1000)
    meter = Meter()
    with meter:
        one = given + 1
        two = one * 2
        del one
        three = two.reshape(10, 100).T  # a view
        _ = three + 1
    assert meter.peak == 2 * 4000


def test_a_product_is_counted_as_torch_does() -> None:
    meter = Meter()
    with meter:
        torch.ones(3, 4) @ torch.ones(4, 5)
        torch.addmm(torch.ones(3, 5), torch.ones(3, 4), torch.ones(4, 5))
        torch.ones(7) + 1
    assert meter.flops == 2 * (2 * 3 * 4 * 5)


def _attend() -> tuple[int, int]:
    query = torch.ones(1, 2, 64, 8, requires_grad=True)
    meter = Meter()
    with meter:
        forward = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        flops = meter.flops
        torch.autograd.grad(forward, query, torch.ones_like(forward))
    return flops, meter.flops - flops


def test_attention_on_a_cpu_is_counted_too() -> None:
    product = 2 * 2 * 64 * 64 * 8
    assert _attend() == (2 * product, 5 * product)
    with FakeTensorMode():
        assert _attend() == (2 * product, 5 * product)
