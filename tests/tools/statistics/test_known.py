"""Sums of what several texts say of layers."""

import pytest
import torch

from tools.base.errors import UnknownStatistics
from tools.statistics.known import ModelStatistics, lean, mix_gamma, mix_statistics, mix_tensors, refuse_infinite


def know(value: float, few: dict[str, int]) -> ModelStatistics:
    vectors = {"a": torch.full((2,), value), "b": torch.full((3,), 2 * value)}
    names = {"a": "a", "b": "a"}
    return ModelStatistics(
        *(vectors, {"a": vectors["b"]}, {"a": vectors["a"]}, names, {"a": value}, {"a": [value, 4 * value]}, few)
    )


def test_a_mixture_is_the_sum_by_shares() -> None:
    found = mix_statistics([know(1.0, {"a": 3}), know(5.0, {"a": 4, "b": 1})], [0.75, 0.25], 64)
    assert found.mean_square["a"].tolist() == [2.0, 2.0] and found.mean_square["b"].tolist() == [4.0] * 3
    assert (found.gradient_square["a"].tolist(), found.clipped_square["a"].tolist()) == ([4.0] * 3, [2.0] * 2)
    assert (found.gradient, found.kappa, found.group) == ({"a": 2.0}, {"a": [2.0, 8.0]}, {"a": "a", "b": "a"})
    assert found.few == {"a": 7}, "b was sent enough tokens of the first text"


def test_gamma_leans_once_by_the_tokens_of_all() -> None:
    each, tokens = [torch.tensor([1.0, 3.0, 8.0]), torch.tensor([2.0, 0.0, 1.0])], 512
    leant = [lean(square_O, tokens) for square_O in each]
    torch.testing.assert_close(mix_gamma(leant, [0.5, 0.5], tokens), lean((each[0] + each[1]) / 2, 2 * tokens))
    torch.testing.assert_close(mix_gamma(leant, [1.0, 0.0], tokens), leant[0])
    torch.testing.assert_close(mix_gamma(leant, [0.8, 0.2], tokens).mean(), (0.8 * each[0] + 0.2 * each[1]).mean())


def test_what_counts_nothing_is_left_out() -> None:
    lost = know(float("nan"), {})
    found = mix_statistics([know(1.0, {"b": 2}), lost], [1.0, 0.0], 64)
    assert found.mean_square["a"].tolist() == [1.0, 1.0] and found.few == {"b": 2}


def test_one_text_is_what_it_is() -> None:
    one = know(1.0, {})
    assert (
        mix_statistics([one], [1.0], 64) is one and mix_tensors([one.mean_square["a"]], [1.0]) is one.mean_square["a"]
    )


def test_what_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(UnknownStatistics, match=r"^activations or gradients of a are not finite in fp16; try --dtype"):
        refuse_infinite(know(float("inf"), {}), "fp16")
