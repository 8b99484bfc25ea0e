"""What others published, against its definition and against ours."""

import pytest
import torch

from billhook_kernels.guard import row_errors
from billhook_kernels.masks import keep_highest, keep_highest_of_rows
from billhook_kernels.obs import prune_obs
from tools.experiments.speed import make_layer, prune_as_published, remove_by_sort


@pytest.mark.parametrize("shape", [(96, 128), (64, 160), (48, 300)])
def test_the_published_loop_prunes_as_well_as_ours(shape: tuple[int, int]) -> None:
    weight, moment = make_layer(*shape, torch.device("cpu"))
    published = prune_as_published(weight, moment, 0.5)
    for start in range(0, shape[1], 128):
        block = published[:, start : start + 128]
        assert int((block == 0).sum()) == block.numel() // 2
    ours = prune_obs(weight, moment, weight.numel() // 2).weight_OI
    theirs, our_error = (float(row_errors(weight - w, moment).sum()) for w in (published, ours))
    masked = float(row_errors(weight * (published == 0), moment).sum())
    assert theirs == pytest.approx(our_error, rel=0.03)
    assert theirs < 0.7 * masked  # or the update does nothing


def test_the_published_masks_are_ours() -> None:
    score = torch.randint(9, (24, 160), generator=torch.Generator().manual_seed(0)).float()  # with many ties
    none_dead, half = torch.zeros_like(score, dtype=torch.bool), score.numel() // 2
    assert torch.equal(remove_by_sort(score, 0.5), ~keep_highest_of_rows(score, none_dead, half))
    layer = remove_by_sort(score.reshape(1, -1), 0.5).reshape(score.shape)
    assert torch.equal(layer, ~keep_highest(score, none_dead, half))


def test_the_published_loop_is_optimal_brain_surgery() -> None:
    """Small enough for the definition: after each column, the inverse of what is left of H, in float64."""
    weight, moment = make_layer(5, 12, torch.device("cpu"))
    published = prune_as_published(weight, moment, 0.5)
    hessian = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(12)
    expected = weight.double()
    for j in range(12):
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = torch.where(published[:, j] == 0, expected[:, j] / inverse[0, 0], 0.0)
        expected[:, j:] -= torch.outer(error, inverse[0])
    torch.testing.assert_close(published.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_published_loop_on_dead_columns_and_in_bf16() -> None:
    weight, moment = make_layer(64, 128, torch.device("cpu"))
    before = weight.clone(), moment.clone()
    moment[3] = moment[:, 3] = 0
    pruned = prune_as_published(weight.bfloat16(), moment, 0.5)
    assert pruned.dtype == torch.bfloat16
    assert int((pruned == 0).sum()) == 64 * 128 // 2 and not pruned[:, 3].any()
    assert torch.isfinite(pruned).all()
    assert torch.equal(weight, before[0])
    moment[3], moment[:, 3] = before[1][3], before[1][:, 3]
    assert torch.equal(moment, before[1])
