"""What a mask keeps, as a vector and back: as torch's own indexing by a mask has it, bit for bit."""

import pytest
import torch

from billhook_kernels.packed import gather_kept, list_kept, spread_kept


def make_mask(shape: tuple[int, int], share: float) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "share"), [((7, 33), 0.4), ((1, 5), 1.0), ((5, 1), 0.0), ((64, 96), 0.55)])
def test_it_is_indexing_by_the_mask(shape: tuple[int, int], share: float, dtype: torch.dtype) -> None:
    keep_OI, full_OI = make_mask(shape, share), torch.randn(shape).to(dtype)
    expected_OI = torch.zeros(shape, dtype=dtype)
    expected_OI[keep_OI] = full_OI[keep_OI]
    assert torch.equal(list_kept(keep_OI), keep_OI.flatten().nonzero()[:, 0])
    kept_S = gather_kept(full_OI, keep_OI)
    assert torch.equal(kept_S, full_OI[keep_OI]) and kept_S.dtype == dtype
    assert torch.equal(spread_kept(kept_S, keep_OI), expected_OI)


def test_neither_the_tensor_nor_the_mask_need_lie_in_one_piece() -> None:
    keep_OI, full_OI = make_mask((12, 20), 0.5).T, torch.randn(12, 20).T
    assert torch.equal(gather_kept(full_OI, keep_OI), full_OI[keep_OI])
    assert torch.equal(spread_kept(full_OI[keep_OI], keep_OI), torch.where(keep_OI, full_OI, 0))


def test_values_come_back_whatever_their_bits_are() -> None:
    bits = torch.tensor([[0x7FC1, -1, 0x0001, -0x8000]], dtype=torch.int16)  # NaNs of two kinds, a subnormal, -0.0
    weight_OI, keep_OI = bits.view(torch.bfloat16), torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(spread_kept(gather_kept(weight_OI, keep_OI), keep_OI).view(torch.int16), bits)


def test_values_behind_the_last_are_left_and_too_few_are_refused() -> None:
    keep_OI = torch.tensor([[True, False, True]])
    assert spread_kept(torch.tensor([1.0, 2.0, 9.0]), keep_OI).tolist() == [[1.0, 0.0, 2.0]]
    with pytest.raises(IndexError):
        spread_kept(torch.tensor([1.0]), keep_OI)
