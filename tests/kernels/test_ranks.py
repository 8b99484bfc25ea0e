"""Integers that sort like scores, checked against Python's own order."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from billhook_kernels.masks import order_preserving_ints

SCORES = st.floats(0, width=32, allow_infinity=False, allow_nan=False, allow_subnormal=True) | st.just(-0.0)


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=12))
def test_order_is_that_of_the_scores_with_dead_below(pairs: list[tuple[float, bool]]) -> None:
    score = torch.tensor([s for s, _ in pairs])
    dead = torch.tensor([d for _, d in pairs])
    ranks = order_preserving_ints(score, dead)
    assert ranks.dtype == torch.int32
    keys = [(-1.0 if d else s) for s, d in pairs]
    for key, rank in zip(keys, ranks.tolist(), strict=True):
        for other_key, other_rank in zip(keys, ranks.tolist(), strict=True):
            assert (key < other_key) == (rank < other_rank)


def test_smallest_subnormal_is_above_zero_and_dead_below_both() -> None:
    ranks = order_preserving_ints(torch.tensor([1e-45, 0.0, -0.0, 5.0]), torch.tensor([False, False, False, True]))
    assert ranks[3] < ranks[1] == ranks[2] < ranks[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts(dtype: torch.dtype) -> None:
    score = torch.tensor([[3.0, 1.0], [2.0, 0.5]], dtype=dtype).T
    ranks = order_preserving_ints(score, torch.zeros(2, 2, dtype=torch.bool))
    assert ranks.flatten().argsort().tolist() == score.flatten().argsort().tolist()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, -1e-45, -1.0])
def test_what_is_no_score_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="a pruning score is negative or not finite"):
        order_preserving_ints(torch.tensor([1.0, bad]), torch.zeros(2, dtype=torch.bool))


def test_empty() -> None:
    assert order_preserving_ints(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).shape == (0,)
