"""Steps of Adam beside its published algorithm in float64, and what survivors are in the model."""

import numpy as np
import pytest
import torch

from tests.tiny import make_tiny_model
from tools.base.errors import BrokenPlan
from tools.models.layers import find_layers
from tools.polish.gradients import Survivors
from tools.polish.loop import RATE, Adam, Step, find_rate, round_by_chance


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


def test_rounding_by_chance_is_to_a_neighbour_and_right_on_average() -> None:
    numbers = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e-39, float("inf"), float("nan")])  # in bf16 as they are, or nearly
    exact_S = torch.cat([numbers, -1e-3 * torch.rand(20, generator=torch.Generator().manual_seed(0))])
    chance = np.random.default_rng(0)
    drawn = torch.stack([round_by_chance(exact_S, chance).double() for _ in range(4000)])
    assert torch.equal(drawn[:, 2:4], exact_S[2:4].double().expand(4000, 2))
    assert torch.equal(drawn[:, :2], torch.zeros(4000, 2, dtype=torch.float64))
    assert bool(torch.isposinf(drawn[:, 5]).all()) and bool(drawn[:, 6].isnan().all())
    last_place = exact_S[7:].double().abs().log2().floor().exp2() / 128
    error = drawn[:, 7:] - exact_S[7:].double()
    assert bool((error.abs() < last_place).all())
    assert bool((error.mean(0).abs() < 4 * 0.5 * last_place / 4000**0.5).all())


def test_a_mean_of_squares_in_bf16_comes_to_its_true_value_where_the_nearest_would_stand_still() -> None:
    """Of gradients that become twice as large: from 1 to 4, by less and less of itself."""
    values = {"a": torch.ones(1000)}
    optimiser = Adam(values, "bf16")
    optimiser.state["second"]["a"].fill_(1.0)
    nearest = torch.ones((), dtype=torch.bfloat16)
    for number in range(5000):
        optimiser.take(values, {"a": torch.full((1000,), 2.0)}, Step(number, 5000))
        nearest = (0.999 * nearest.float() + 0.001 * 4.0).bfloat16()
    second = optimiser.state["second"]["a"]
    true = 4.0 - 3.0 * 0.999**5000
    assert second.dtype == torch.bfloat16 and float(second.float().mean()) == pytest.approx(true, rel=0.01)
    assert float((second.float() / true - 1).square().mean().sqrt()) < 0.1
    assert float(nearest) < 0.7 * true


def test_means_in_bf16_are_drawn_for_each_layer_and_step_wherever_it_is_begun() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [{name: torch.randn(40, generator=generator) for name in "ab"} for _ in range(3)]

    def begin() -> tuple[dict[str, torch.Tensor], Adam]:
        values = {name: torch.ones(40) for name in "ab"}
        return values, Adam(values, "bf16")

    (values, whole), (others, rest) = begin(), begin()
    for number in range(3):
        whole.take(values, gradients[number], Step(number, 3))
        if number == 1:
            for name in "ab":
                others[name].copy_(values[name])
                for what, vectors in rest.state.items():
                    vectors[name].copy_(whole.state[what][name])
    rest.take(others, dict(reversed(gradients[2].items())), Step(2, 3))
    for name in "ab":
        assert torch.equal(others[name], values[name])
        assert all(torch.equal(rest.state[what][name], whole.state[what][name]) for what in ("first", "second"))
    alike = [{name: torch.full((40,), 0.3) for name in "ab"} for _ in range(2)]
    _, optimiser = begin()
    optimiser.take(others, alike[0], Step(0, 3))
    assert not torch.equal(optimiser.state["first"]["a"], optimiser.state["first"]["b"])


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
