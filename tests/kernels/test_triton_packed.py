"""Packed weights of Triton's kernels are those of torch, bit for bit."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from billhook_kernels.packed import (
    BITS,
    pack_bits,
    pack_mask,
    pack_rows,
    unpack_mask,
    unpack_rows,
)
from tests.kernels.layers import DTYPES

pytest.importorskip("billhook_kernels.triton_packed", reason="triton is not installed")
Ask = Callable[[str], None]


def make_bits(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A weight of any bits: NaNs with payloads, infinities, zeros of both signs."""
    width = torch.iinfo(BITS[dtype])
    generator = torch.Generator().manual_seed(columns)
    bits = torch.randint(width.min, width.max, (rows, columns), generator=generator).to(BITS[dtype])
    bits[torch.rand(rows, columns, generator=generator) < 0.4] = 0
    bits[0, -1] = width.min  # -0.0
    return bits.view(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


SHAPES = [(1, 1), (2, 31), (3, 64), (2, 65)]


# With more than a block of columns one dtype of each width has to do: Triton's interpreter takes seconds.
@pytest.mark.parametrize(
    ("shape", "dtype"), [*product(SHAPES, DTYPES), *product([(2, 2100)], [torch.bfloat16, torch.float32])]
)
def test_weights_are_packed_as_by_torch(
    shape: tuple[int, int], dtype: torch.dtype, ask_for_kernels: Ask, device: torch.device
) -> None:
    weight_OI = make_bits(*shape, dtype)
    mask = weight_OI == 0
    if mask.numel() < 1000:  # as it lies in memory a mask may be turned; thousands of rows take the interpreter long
        mask = mask.T
    ask_for_kernels("torch")
    expected = [*pack_rows(weight_OI)[:3], pack_mask(mask), pack_bits(mask)]
    ask_for_kernels("triton")
    packed = pack_rows(weight_OI.to(device))
    found = [*packed[:3], pack_mask(mask.to(device)), pack_bits(mask.to(device))]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert packed.columns == shape[1] and found[4].device.type == "cpu"
    assert same(unpack_rows(packed), weight_OI)
    assert same(unpack_mask(found[3], mask.shape[1]), mask)
