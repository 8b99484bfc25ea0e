"""Masks of Triton's kernels are those of torch, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from billhook_kernels.masks import keep_highest, keep_highest_of_groups, keep_highest_of_rows, keep_wanda, kth_smallest
from billhook_kernels.methods import LayerStatistics, prune_weight
from billhook_kernels.obs import keep_highest_of_columns
from billhook_kernels.statistics import level_of_each_weight
from tests.kernels.layers import MASK_ONLY

triton_masks = pytest.importorskip("billhook_kernels.triton_masks", reason="triton is not installed")
Compare = Callable[..., Tensor]


@pytest.fixture
def compare(ask_for_kernels: Callable[[str], None], device: torch.device) -> Compare:
    """Calls a function with torch's kernels on the CPU, and with Triton's; both give the same bits."""

    def run(function: Callable[..., Tensor], *arguments: object) -> Tensor:
        ask_for_kernels("torch")
        expected = function(*arguments)
        ask_for_kernels("triton")
        found = function(*[a.to(device) if isinstance(a, Tensor) else a for a in arguments])
        assert found.dtype == expected.dtype and torch.equal(found.cpu(), expected)
        return expected

    return run


def make_scores(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(score, dead) with many ties and the least and greatest scores there are; the second row has few to lose."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, columns, generator=generator).mul(9).round()
    score[0, :6] = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 3.4e38, 3.4e38])
    dead = torch.rand(rows, columns, generator=generator) < 0.1
    dead[1 % rows, columns // 5 :] = True
    return score, dead


@pytest.fixture(params=["row", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows that one program holds, and longer ones: here of five chunks, the last one smaller."""
    if request.param == "chunks":
        monkeypatch.setattr(triton_masks, "WIDEST_ROW", 15)
        monkeypatch.setattr(triton_masks, "CHUNK", 16)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_layers_and_rows_of_every_count(compare: Compare) -> None:
    score, dead = make_scores(3, 70)
    for zeros in (int(dead.sum()), 101, 150):
        assert int((~compare(keep_highest, score, dead, zeros)).sum()) == zeros
        assert int((~compare(keep_highest_of_rows, score, dead, zeros)).sum()) == zeros
    compare(keep_highest, score, dead, 0)
    compare(keep_highest, score.T, dead.T, 77)
    compare(keep_highest_of_rows, score.T[:6], torch.zeros(6, 3, dtype=torch.bool), 10)
    compare(level_of_each_weight, score, dead, [0, 30, 150, 210])


@pytest.mark.usefixtures("way")
def test_the_kth_smallest_of_each_row(compare: Compare) -> None:
    ranks = torch.randint(0, 2**31 - 1, (2, 45), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    for k in (1, 22, 45):
        compare(kth_smallest, ranks, k)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wanda_in_one_step(compare: Compare, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 61, generator=generator).to(dtype)
    weight[:, ::5], weight[1, :20], weight[2, 3] = 0.25, -0.0, 1e-40
    mean_square = torch.rand(61, generator=generator)
    mean_square[7], mean_square[8], mean_square[9] = 0.0, -0.0, 1e-38
    for zeros in (int((weight == 0).sum()), 80, 91):
        assert int((~compare(keep_wanda, weight, mean_square, zeros)).sum()) == zeros


@pytest.mark.usefixtures("way")
def test_scores_that_are_none_are_refused(ask_for_kernels: Callable[[str], None], device: torch.device) -> None:
    ask_for_kernels("triton")
    weight = torch.ones(2, 20, device=device)
    for wrong in (torch.nan, torch.inf, -1.0):
        mean_square = torch.ones(20, device=device)
        mean_square[3] = wrong
        with pytest.raises(ValueError, match=r"^a pruning score is negative or not finite$"):
            keep_wanda(weight, mean_square, 20)


@pytest.mark.parametrize(("pruned", "group"), [(2, 4), (0, 4), (4, 4), (3, 5), (16, 32), (17, 40)])
def test_groups(compare: Compare, pruned: int, group: int) -> None:
    score, dead = make_scores(3, 2 * group, seed=group)
    compare(keep_highest_of_groups, score, dead, pruned, group)
    compare(keep_highest_of_groups, score.T.reshape(2, -1), dead.T.reshape(2, -1), pruned, group)
    ranks_MC = torch.randint(0, 5, (group, 7), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    compare(keep_highest_of_columns, ranks_MC, pruned)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("method", MASK_ONLY)
def test_methods_that_only_mask(compare: Compare, method: str, pattern: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 24, generator=generator).bfloat16()

    def prune(weight_OI: Tensor, mean_square_I: Tensor, gradient_square_O: Tensor) -> Tensor:
        statistics = LayerStatistics(mean_square_I, gradient_square_O)
        return prune_weight(method, weight_OI, statistics, 60, refit=False, pattern=pattern).weight_OI

    compare(prune, weight, torch.rand(24, generator=generator), torch.rand(5, generator=generator))
