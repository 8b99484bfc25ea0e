"""N:M masks against a stable sort of every group, written out in plain Python, bit for bit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from billhook_kernels.masks import check_pattern, keep_highest_of_groups
from tests.kernels.plain import FEW_VALUES, plain_groups


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """(score, dead, pruned, group), often with ties and groups that hold more exact zeros than they may lose."""
    rows, group, groups = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    columns = group * groups
    values = st.lists(FEW_VALUES, min_size=columns, max_size=columns)
    flags = st.lists(st.booleans(), min_size=columns, max_size=columns)
    score = torch.tensor(draw(st.lists(values, min_size=rows, max_size=rows)))
    dead = torch.tensor(draw(st.lists(flags, min_size=rows, max_size=rows)))
    return score, dead, draw(st.integers(0, group)), group


@given(layers())
def test_it_is_a_stable_sort_of_each_group(layer: tuple[Tensor, Tensor, int, int]) -> None:
    score, dead, pruned, group = layer
    keep = keep_highest_of_groups(score, dead, pruned, group)
    assert keep.dtype == torch.bool
    assert keep.tolist() == [
        plain_groups(s, d, pruned, group) for s, d in zip(score.tolist(), dead.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("pruned", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (5, 32), (20, 40), (30, 120), (600, 1200)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_every_size(pruned: int, group: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(group)
    score = torch.rand(5, 2400 // group * group, generator=generator).mul(50).round().to(dtype)
    dead = torch.rand(score.shape, generator=generator) < 0.1
    keep = keep_highest_of_groups(score, dead, pruned, group)
    assert ((~keep).reshape(-1, group).sum(1) == pruned).all()
    assert keep.tolist() == [
        plain_groups(s, d, pruned, group) for s, d in zip(score.tolist(), dead.tolist(), strict=True)
    ]


def test_a_transposed_view_is_masked_where_it_lies() -> None:
    score = torch.rand(8, 3, generator=torch.Generator().manual_seed(1)).T
    dead = torch.zeros(3, 8, dtype=torch.bool)
    assert torch.equal(
        keep_highest_of_groups(score, dead, 2, 4), keep_highest_of_groups(score.contiguous(), dead, 2, 4)
    )


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(ValueError, match=r"^10 inputs are not divisible into groups of 4$"):
        keep_highest_of_groups(torch.ones(2, 10), torch.zeros(2, 10, dtype=torch.bool), 2, 4)
    with pytest.raises(ValueError, match=r"^5 zeros do not fit into a group of 4 inputs$"):
        keep_highest_of_groups(torch.ones(2, 8), torch.zeros(2, 8, dtype=torch.bool), 5, 4)


def test_a_pattern_gives_one_number_of_zeros() -> None:
    check_pattern(torch.Size((3, 8)), 12, (2, 4))
    with pytest.raises(ValueError, match=r"^13 zeros asked of a layer to which the pattern 2:4 gives 12$"):
        check_pattern(torch.Size((3, 8)), 13, (2, 4))
    with pytest.raises(ValueError, match=r"^8 inputs are not divisible into groups of 3$"):
        check_pattern(torch.Size((3, 8)), 8, (1, 3))


def test_scores_that_are_not_finite_are_refused() -> None:
    score = torch.ones(1, 4)
    score[0, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        keep_highest_of_groups(score, torch.zeros(1, 4, dtype=torch.bool), 2, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_mask() -> None:
    score = torch.rand(64, 96, generator=torch.Generator().manual_seed(2)).mul(8).round()
    for pruned, group in ((2, 4), (20, 48)):
        keep = keep_highest_of_groups(score, score < 1, pruned, group)
        assert torch.equal(keep, keep_highest_of_groups(score.cuda(), score.cuda() < 1, pruned, group).cpu())
