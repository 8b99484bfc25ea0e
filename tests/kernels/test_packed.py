"""Packed weights come back bit for bit, wrong ones are refused."""

import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from billhook_kernels.packed import (
    BITS,
    PADDING,
    check_packed,
    pack_bits,
    pack_mask,
    pack_rows,
    unpack_mask,
    unpack_rows,
)
from tests.kernels.layers import make_sparse

BF16 = torch.bfloat16


@given(st.sampled_from(sorted(BITS, key=str)), st.data())
def test_any_bits_come_back(dtype: torch.dtype, data: st.DataObject) -> None:
    width = torch.iinfo(BITS[dtype])
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    patterns = st.integers(width.min, width.max) | st.just(0) | st.just(width.min)  # the last is -0.0
    raw = data.draw(st.lists(patterns, min_size=rows * columns, max_size=rows * columns))
    bits_OI = torch.tensor(raw, dtype=BITS[dtype]).reshape(rows, columns)
    made = pack_rows(bits_OI.view(dtype))
    checked = check_packed(made.mask_OW, made.values, (rows, columns))
    assert made.values.numel() == int((bits_OI != 0).sum()) + PADDING
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(made[:3], checked[:3], strict=True)
    )
    assert torch.equal(unpack_rows(checked).contiguous().view(BITS[dtype]), bits_OI)


@given(st.integers(0, 5), st.integers(0, 70), st.data())
def test_mask_bits_are_row_major_lowest_first(rows: int, columns: int, data: st.DataObject) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    keep_OI = torch.tensor(flags, dtype=torch.bool).reshape(rows, columns)
    bits = pack_bits(keep_OI)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-len(flags) // 8)
    assert [bool(int(bits[i // 8]) >> (i % 8) & 1) for i in range(len(flags))] == flags
    assert bits.numpy().tobytes() == np.packbits(keep_OI.numpy(), bitorder="little").tobytes()
    mask_OW = pack_mask(keep_OI)
    assert mask_OW.dtype == torch.int32 and mask_OW.shape == (rows, -(-columns // 32))
    assert torch.equal(unpack_mask(mask_OW, columns), keep_OI)


def test_the_layout_is_the_one_described() -> None:
    weight_OI = torch.zeros(2, 35, dtype=BF16)
    weight_OI[0, 1], weight_OI[0, 34], weight_OI[1, 31], weight_OI[1, 0] = 1, 2, 4, 3
    mask_OW, values, offsets_O, columns = pack_rows(weight_OI)
    assert mask_OW.tolist() == [[0b10, 0b100], [1 - 2**31, 0]] and mask_OW.dtype == torch.int32
    assert values.tolist() == [1, 2, 3, 4] + [0] * PADDING and values.dtype == BF16
    assert offsets_O.tolist() == [0, 2] and offsets_O.dtype == torch.int64
    assert columns == 35


def test_a_transposed_view_is_packed_as_it_reads() -> None:
    weight_OI = make_sparse(40, 5, BF16).T
    assert torch.equal(unpack_rows(pack_rows(weight_OI)), weight_OI)


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (torch.zeros(2, 2, dtype=torch.float64), r"a weight \(2, 2\) of torch.float64"),
        (torch.zeros(4, dtype=BF16), r"a weight \(4,\) of torch.bfloat16"),
        (torch.zeros(0, 4, dtype=BF16), r"a weight \(0, 4\) of torch.bfloat16"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} cannot be packed$"):
        pack_rows(weight)


def test_what_does_not_fit_together_is_refused() -> None:
    mask_OW, values, _, _ = pack_rows(make_sparse(4, 40, BF16))
    kept = values.numel() - PADDING

    def refuse(problem: str, mask: Tensor = mask_OW, values: Tensor = values, shape: tuple[int, int] = (4, 40)) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
            check_packed(mask, values, shape)

    refuse("a weight of shape (0, 40) has no values", shape=(0, 40))
    refuse("a weight of shape (4, -40) has no values", shape=(4, -40))
    needs = "torch.int32 (4, 2), as (4, 40) needs"
    refuse(f"the mask is torch.int64 (4, 2) and not {needs}", mask_OW.long())
    refuse(f"the mask is torch.int32 (2, 4) and not {needs}", mask_OW.view(2, 4))
    refuse("the mask is torch.int32 (4, 2) and not torch.int32 (4, 3), as (4, 65) needs", shape=(4, 65))
    refuse("the mask has bits behind its last column", shape=(4, 33))
    refuse("the values are torch.float64 of 1 dimensions, which cannot be", values=values.double())
    refuse("the values are torch.bfloat16 of 2 dimensions, which cannot be", values=values[None])
    for less in (1, PADDING, values.numel()):
        count = values.numel() - less
        refuse(f"{count} values for {kept} set bits and {PADDING} of padding", values=values[:count])
    more = torch.cat([torch.full((4, 1), -1, dtype=torch.int32), mask_OW[:, 1:]], 1)
    counted = 4 * 32 + sum(int(word).bit_count() for word in mask_OW[:, 1])
    refuse(f"{values.numel()} values for {counted} set bits and {PADDING} of padding", more)
    spoilt = values.clone()
    spoilt[-1] = -0.0
    refuse("the padding behind the values is not zero", values=spoilt)
