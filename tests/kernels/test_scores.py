"""Scores against their formulas in float64."""

import math

import pytest
import torch

from billhook_kernels.masks import score_two_sided, score_wanda


def make(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 11, generator=generator).to(dtype)
    return weight, torch.rand(11, generator=generator), torch.rand(7, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wanda(dtype: torch.dtype) -> None:
    weight, a, _ = make(dtype)
    score = score_wanda(weight, a)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, (weight.double().abs() * a.double().sqrt()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_sided_up_to_a_power_of_two(dtype: torch.dtype) -> None:
    weight, a, gamma = make(dtype)
    plain = weight.double() ** 2 * a.double() * gamma.double()[:, None]
    score = score_two_sided(weight, a, gamma)
    assert score.dtype == torch.float32
    factor = 2.0 ** -sum(math.frexp(float(square.mean()))[1] for square in (a, gamma))
    torch.testing.assert_close(score, (plain * factor).float())
    assert torch.equal(score, weight.float() ** 2 * a * gamma[:, None] * factor)


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_two_sided_does_not_leave_the_range_of_fp32(scale: float) -> None:
    weight, a, gamma = make(torch.float32)
    score, scaled = score_two_sided(weight, a, gamma), score_two_sided(weight, a * scale, gamma * scale)
    torch.testing.assert_close(scaled / scaled.mean(), score / score.mean())


def test_all_zero_statistics_score_zero() -> None:
    weight, a, gamma = make(torch.float32)
    assert not score_two_sided(weight, a * 0, gamma).any()
    assert not score_two_sided(weight, a, gamma * 0).any()
    assert not score_wanda(weight, a * 0).any()
