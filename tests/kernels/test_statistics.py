"""Statistics against explicit loops in float64."""

import weakref
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from billhook_kernels.statistics import (
    add_second_moment,
    clip_tokens,
    lean_anew,
    lean_to_mean,
    level_of_each_weight,
    mean_absolute_gradient,
    nested_parts,
    squared_loss_changes,
    sum_squares,
)
from tests.kernels.layers import DTYPES


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_mean_squares_of_few_tokens_lean_to_their_mean_which_stays() -> None:
    square = torch.tensor([0.0, 2.0])
    assert lean_to_mean(square, 3, 1).tolist() == [0.25, 1.75]
    assert lean_to_mean(square, 3, 0).tolist() == square.tolist()
    torch.testing.assert_close(lean_anew(lean_to_mean(square, 3, 5), 3, 12, 5), lean_to_mean(square, 12, 5))
    many = lean_to_mean(make(300).square(), 512, 256)
    assert float(many.mean()) == pytest.approx(float(make(300).square().mean()), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_moment_adds_up_over_batches(dtype: torch.dtype) -> None:
    batches = [make(5, 4, seed=1, dtype=dtype), make(1, 4, seed=2, dtype=dtype), make(0, 4, dtype=dtype)]
    total = torch.zeros(4, 4)
    plain = np.zeros((4, 4))
    for x in batches:
        add_second_moment(total, x)
        for row in x.double().numpy():
            plain += np.outer(row, row)
    np.testing.assert_allclose(total.numpy(), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_as_exact_as_in_fp32(dtype: torch.dtype) -> None:
    """Large enough for a processor's instructions for bf16, which would round what is not bf16 by 2^-9."""
    x, g, total = make(256, 128, seed=1, dtype=dtype), make(256, 64, seed=2, dtype=dtype), torch.zeros(128, 128)
    add_second_moment(total, x)
    size = x.double().square().sum(0).sqrt()
    off = (total - x.double().T @ x.double()).abs() / (size[:, None] * size)
    assert float(off.max()) < 2e-6
    for weight in (make(64, 128, seed=3, dtype=dtype).float(), make(64, 128, seed=4)):
        exact = float(((x.double() @ weight.double().T) * g.double()).sum(1).square().sum())
        assert float(squared_loss_changes([(x, g)], [weight])) == pytest.approx(exact, rel=1e-5)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_squares(dtype: torch.dtype) -> None:
    x = make(6, 3, dtype=dtype) * 100  # the square of 300 is beyond fp16
    plain = [sum(float(v) ** 2 for v in column) for column in x.T]
    np.testing.assert_allclose(sum_squares(x).numpy(), plain, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_absolute_gradient(dtype: torch.dtype) -> None:
    g, x = make(6, 3, seed=1, dtype=dtype), make(6, 5, seed=2, dtype=dtype)
    gradient = sum(np.outer(g_t, x_t) for g_t, x_t in zip(g.double().numpy(), x.double().numpy(), strict=True))
    assert mean_absolute_gradient(g, x) == pytest.approx(float(np.abs(gradient).mean()), rel=1e-5)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans()), min_size=1, max_size=12),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_levels_hold_the_lowest_scores_and_ties_at_their_threshold(
    weights: list[tuple[float, bool]], shares: list[float]
) -> None:
    zeros = sorted(round(share * len(weights)) for share in shares)
    keys = [-1.0 if dead else score for score, dead in weights]
    score = torch.tensor([[s for s, _ in weights]])
    dead = torch.tensor([[d for _, d in weights]])
    level = level_of_each_weight(score, dead, zeros)
    assert level.dtype == torch.uint8 and level.shape == score.shape
    for i, count in enumerate(zeros):
        highest = sorted(keys)[count - 1] if count else -2.0
        assert (level[0] <= i).tolist() == [key <= highest for key in keys]


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_loss_changes_are_explicit_sums_over_each_window(dtype: torch.dtype) -> None:
    tokens, d_in, d_out, levels = 7, 5, 3, 4
    g, x = make(tokens, d_out, seed=1, dtype=dtype), make(tokens, d_in, seed=2, dtype=dtype)
    weight = make(d_out, d_in, seed=3, dtype=dtype)
    level = torch.randint(0, levels + 1, (d_out, d_in), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    pairs = [(x[:3], g[:3]), (x[3:], g[3:])]
    result = squared_loss_changes(pairs, nested_parts(weight, level, levels))
    assert result.dtype == torch.float64 and result.shape == (levels, 2)
    for s in range(levels):
        removed = (weight.double() * (level <= s)).numpy()
        plain = [0.0, 0.0]
        for t, (g_t, x_t) in enumerate(zip(g.double().numpy(), x.double().numpy(), strict=True)):
            plain[t >= 3] += sum(g_t[i] * removed[i, j] * x_t[j] for i in range(d_out) for j in range(d_in)) ** 2
        assert result[s].tolist() == pytest.approx(plain, rel=1e-5)


def test_one_change_is_held_at_a_time() -> None:
    made: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[Tensor]:
        for seed in range(3):
            assert all(part() is None for part in made), "it is let go before the next one is made"
            part = make(3, 5, seed=seed)
            made.append(weakref.ref(part))
            yield part
            del part

    squared_loss_changes([(make(6, 5, seed=7), make(6, 3, seed=6))], parts())
    assert len(made) == 3


def test_levels_and_changes_of_a_transposed_weight() -> None:
    weight = make(5, 3, seed=5).T
    level = level_of_each_weight(weight.abs(), weight == 0, [4, 9])
    assert [(int((level <= i).sum())) for i in (0, 1)] == [4, 9]
    pairs = [(make(6, 5, seed=7), make(6, 3, seed=6))]
    results = [squared_loss_changes(pairs, nested_parts(w, level, 2)) for w in (weight, weight.contiguous())]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_token_counts_for_more_than_a_multiple_of_the_median_one(dtype: torch.dtype) -> None:
    g = make(9, 3, seed=1, dtype=dtype)
    g[4] *= 50
    g[7] = 0
    clipped = clip_tokens(g, 10.0)
    before, after = g.double().square().sum(1), clipped.double().square().sum(1)
    assert clipped.dtype == torch.float32
    torch.testing.assert_close(after, before.clamp(max=10 * float(before.median())), rtol=1e-5, atol=0)
    torch.testing.assert_close(clipped[:4], g[:4].float()), "tokens below the limit stay as they are"
