"""Steps of Adam beside its published algorithm in float64, and what survivors are in the model."""

import numpy as np
import pytest
import torch

from tests.tiny import make_tiny_model
from tools.base.errors import BrokenPlan
from tools.models.layers import find_layers
from tools.polish.optimisers import RATE, Adam, Step, find_rate
from tools.polish.survivors import Survivors


def test_adam_is_that_of_its_paper_its_rate_relative_to_the_size_of_a_layers_survivors() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(50, generator=generator), "b": 0.02 * torch.randn(7, generator=generator)}
    sizes = {name: float(value.double().square().mean().sqrt()) for name, value in values.items()}
    optimiser = Adam(values)
    expected = {name: value.double().numpy().copy() for name, value in values.items()}
    first = {name: np.zeros(len(value)) for name, value in values.items()}
    second = {name: np.zeros(len(value)) for name, value in values.items()}
    for number in range(4):
        gradients = {name: 1e-3 * torch.randn(len(value), generator=generator) for name, value in values.items()}
        optimiser.take(values, gradients, Step(number, 4))
        for name, gradient in gradients.items():
            g, t = gradient.double().numpy(), number + 1
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean, square = first[name] / (1 - 0.9**t), second[name] / (1 - 0.999**t)
            expected[name] -= find_rate(Step(number, 4)) * sizes[name] * mean / (np.sqrt(square) + 1e-8)
    for name, value in values.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=0, atol=5e-7)


def test_the_rate_rises_and_then_falls_along_a_line() -> None:
    rates = [find_rate(Step(number, 20)) / RATE for number in range(20)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 18 / 19])
    assert rates[-1] == pytest.approx(1 / 19)
    assert [find_rate(Step(0, 1))] == [RATE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_survivors_that_come_out_as_zero_are_mended_and_zeros_stay(dtype: torch.dtype) -> None:
    model = make_tiny_model("gpt2").to(dtype)
    layers = find_layers(model)[:2]
    layer = layers[0]
    layer.write(layer.weight_OI * (torch.arange(layer.weight_OI.shape[1]) % 3 > 0))
    survivors, zeros = Survivors(layers), layer.weight_OI == 0
    values = survivors.read()
    assert values[layer.name].dtype == torch.float32 and len(values[layer.name]) == int((~zeros).sum())
    before = layer.weight_OI.clone()
    survivors.write(values)
    assert torch.equal(layer.weight_OI, before)
    values[layer.name][5], values[layer.name][6] = 0.0, -1e-30
    survivors.write(values)
    assert torch.equal(layer.weight_OI == 0, zeros)
    tiny = torch.finfo(dtype).tiny
    mended = survivors.gather(layer.name, layer.weight_OI)[5:7].tolist()
    assert mended == [tiny, tiny if dtype == torch.float16 else pytest.approx(-1e-30)]
    values[layer.name][3] = torch.inf
    with pytest.raises(BrokenPlan, match=f"^polish: the weights of layer {layer.name} are not finite$"):
        survivors.write(values)
