"""Masks against a stable sort written out in plain Python, bit for bit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import billhook_kernels.dispatch
import billhook_kernels.masks
from billhook_kernels.masks import keep_highest, keep_highest_of_rows, kth_smallest, kth_smallest_each, score_wanda
from tests.kernels.plain import FEW_VALUES, plain_mask, plain_order


def plain_mask_of_rows(score: list[list[float]], dead: list[list[bool]], zeros: int) -> list[list[bool]]:
    """One weight at a time: every row gets its share of zeros, but keeps the exact zeros it has."""
    counts = [sum(row) for row in dead]
    share = 0
    while share < len(score[0]) and sum(max(share + 1, sum(row)) for row in dead) <= zeros:
        share += 1
    counts = [max(share, count) for count in counts]
    orders = [plain_order(s, d) for s, d in zip(score, dead, strict=True)]
    open_rows = [r for r in range(len(score)) if sum(dead[r]) <= share < len(score[0])]
    open_rows.sort(key=lambda r: (score[r][orders[r][share]], r))
    for r in open_rows[: zeros - sum(counts)]:
        counts[r] += 1
    return [plain_mask(s, d, count) for s, d, count in zip(score, dead, counts, strict=True)]


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(score, dead) of a small layer, often with ties, rows of zeros and columns of zeros."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    values = st.lists(FEW_VALUES, min_size=columns, max_size=columns)
    score = torch.tensor(draw(st.lists(values, min_size=rows, max_size=rows)))
    flags = st.lists(st.booleans(), min_size=columns, max_size=columns)
    dead = torch.tensor(draw(st.lists(flags, min_size=rows, max_size=rows)))
    dead &= torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))[:, None]
    return score, dead


@given(layers(), st.floats(0, 1))
def test_keep_highest_is_a_stable_sort(layer: tuple[Tensor, Tensor], share: float) -> None:
    score, dead = layer
    zeros = round(share * score.numel())
    keep = keep_highest(score, dead, zeros)
    assert keep.dtype == torch.bool and keep.shape == score.shape
    assert keep.flatten().tolist() == plain_mask(score.flatten().tolist(), dead.flatten().tolist(), zeros)


@given(layers(), st.floats(0, 1))
def test_keep_highest_of_rows_is_a_stable_sort_of_each_row(layer: tuple[Tensor, Tensor], share: float) -> None:
    score, dead = layer
    least = int(dead.sum())
    zeros = least + round(share * (score.numel() - least))
    keep = keep_highest_of_rows(score, dead, zeros)
    assert int((~keep).sum()) == zeros
    assert keep.tolist() == plain_mask_of_rows(score.tolist(), dead.tolist(), zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 97), (33, 65), (64, 31)])
def test_larger_layers_of_every_dtype(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=generator).mul(0.02).to(dtype)
    weight[torch.rand(shape, generator=generator) < 0.05] = 0
    mean_square = torch.rand(shape[1], generator=generator)
    mean_square[::7] = 0  # dead columns: their weights all tie at zero
    score, dead = score_wanda(weight, mean_square), weight == 0
    for zeros in {int(dead.sum()), int(0.45 * weight.numel()), weight.numel()} - set(range(int(dead.sum()))):
        keep = keep_highest(score, dead, zeros)
        assert keep.flatten().tolist() == plain_mask(score.flatten().tolist(), dead.flatten().tolist(), zeros)
        of_rows = keep_highest_of_rows(score, dead, zeros)
        assert of_rows.tolist() == plain_mask_of_rows(score.tolist(), dead.tolist(), zeros)


def test_a_divisible_count_is_the_same_in_every_row() -> None:
    score = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    keep = keep_highest_of_rows(score, torch.zeros(6, 10, dtype=torch.bool), 27)
    assert sorted((~keep).sum(1).tolist()) == [4, 4, 4, 5, 5, 5]


def test_a_row_sparser_than_its_share_spares_the_others() -> None:
    score = torch.ones(3, 4)
    dead = torch.tensor([[True] * 4, [False] * 4, [False] * 4])
    assert (~keep_highest_of_rows(score, dead, 6)).sum(1).tolist() == [4, 1, 1]


def test_fewer_zeros_than_the_layer_has_are_refused() -> None:
    dead = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="1 zeros asked of a layer that has 2 already"):
        keep_highest_of_rows(torch.ones(2, 2), dead, 1)


def test_a_transposed_view_is_masked_where_it_lies() -> None:
    score = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).T
    dead = torch.zeros(3, 5, dtype=torch.bool)
    assert torch.equal(keep_highest(score, dead, 7), keep_highest(score.contiguous(), dead, 7))
    assert torch.equal(keep_highest_of_rows(score, dead, 7), keep_highest_of_rows(score.contiguous(), dead, 7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_masks() -> None:
    score = torch.rand(64, 96, generator=torch.Generator().manual_seed(2)).mul(8).round()
    dead = score < 1
    for keep in (keep_highest, keep_highest_of_rows):
        assert torch.equal(keep(score, dead, 3000), keep(score.cuda(), dead.cuda(), 3000).cpu())


def test_neither_threads_nor_blocks_of_rows_change_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ties, rows that have more exact zeros than their share, and counts that do not divide evenly."""
    generator = torch.Generator().manual_seed(2)
    threads, cases = torch.get_num_threads(), []
    for i in range(200):
        score = torch.randint(0, (2, 5, 1000)[i % 3], (1 + i % 9, 1 + i % 11), generator=generator).float()
        dead = torch.rand(score.shape, generator=generator) < (0, 0.1, 0.6)[i % 3]
        dead[0] |= i % 5 == 0
        least = int(dead.sum())
        zeros = least + int(torch.randint(0, score.numel() - least + 1, (), generator=generator))
        cases.append((score, dead, zeros, keep_highest_of_rows(score, dead, zeros)))
    monkeypatch.setattr(billhook_kernels.dispatch, "THREAD_BYTES", 1)
    try:
        for count, size in ((1, 4), (3, 4), (2, 64)):
            torch.set_num_threads(count)
            monkeypatch.setattr(billhook_kernels.masks, "BLOCK_BYTES", size)
            for score, dead, zeros, keep in cases:
                assert int((~keep).sum()) == zeros
                assert torch.equal(keep_highest_of_rows(score, dead, zeros), keep)
    finally:
        torch.set_num_threads(threads)


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(1, 4))
def test_kth_smallest(rows: list[list[int]], k: int) -> None:
    ranks = torch.tensor(rows, dtype=torch.int32)
    before = ranks.clone()
    assert kth_smallest(ranks, k).tolist() == [sorted(row)[k - 1] for row in rows]
    counts = [len(rows[0]), 0, k, 1, k]
    expected = [sorted(rows[0])[each - 1] if each else -1 for each in counts]
    assert kth_smallest_each(ranks[0], counts).tolist() == expected
    assert torch.equal(ranks, before)  # numpy's partition works on a copy
