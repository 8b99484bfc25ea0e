"""Packed weights come back bit for bit."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from kernels.packing import pack_mask, pack_weight, unpack_mask, unpack_weight

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NAN_WITH_PAYLOAD = {torch.float32: 0x7FC0BEEF, torch.bfloat16: 0x7FA5, torch.float16: 0x7E5A}


@given(st.integers(0, 5), st.integers(0, 20), st.data())
def test_mask_bits_are_row_major_lowest_first(rows: int, columns: int, data: st.DataObject) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    keep = torch.tensor(flags, dtype=torch.bool).reshape(rows, columns)
    bits = pack_mask(keep)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-len(flags) // 8)
    assert [bool(int(bits[i // 8]) >> (i % 8) & 1) for i in range(len(flags))] == flags
    assert torch.equal(unpack_mask(bits, (rows, columns)), keep)


@given(st.sampled_from(sorted(INTEGERS, key=str)), st.data())
def test_any_bits_come_back(dtype: torch.dtype, data: st.DataObject) -> None:
    width = torch.iinfo(INTEGERS[dtype])
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)))
    patterns = st.integers(width.min, width.max) | st.just(0)
    raw = data.draw(st.lists(patterns, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    weight = torch.tensor(raw, dtype=INTEGERS[dtype]).view(dtype).reshape(shape)
    bits, values = pack_weight(weight)
    again = unpack_weight(bits, values, shape)
    expected = torch.where(weight == 0, 0, weight)  # a negative zero counts as zero
    assert again.dtype == dtype
    assert torch.equal(again.view(INTEGERS[dtype]), expected.view(INTEGERS[dtype]))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_payload_of_a_nan_survives(dtype: torch.dtype) -> None:
    raw = torch.tensor([[0, NAN_WITH_PAYLOAD[dtype], 1]], dtype=INTEGERS[dtype])
    bits, values = pack_weight(raw.view(dtype))
    assert values.numel() == 2
    assert torch.equal(unpack_weight(bits, values, (1, 3)).view(INTEGERS[dtype]), raw)


def test_all_and_nothing() -> None:
    for weight in (torch.zeros(3, 5), torch.ones(3, 5), torch.zeros(0, 5)):
        bits, values = pack_weight(weight)
        assert torch.equal(unpack_weight(bits, values, (weight.shape[0], weight.shape[1])), weight)


def test_a_transposed_view_is_packed_as_it_reads() -> None:
    weight = torch.arange(6.0).reshape(2, 3).T
    bits, values = pack_weight(weight)
    assert values.tolist() == [3, 1, 4, 2, 5]
    assert torch.equal(unpack_weight(bits, values, (3, 2)), weight)


def test_padding_bits_are_ignored() -> None:
    assert unpack_mask(torch.tensor([0xFF], dtype=torch.uint8), (1, 3)).tolist() == [[True] * 3]


def test_wrong_lengths_are_refused() -> None:
    bits, values = pack_weight(torch.tensor([[1.0, 0.0, 2.0]]))
    with pytest.raises(ValueError, match="1 mask bytes for 9 weights"):
        unpack_mask(bits, (3, 3))
    with pytest.raises(ValueError, match="2 mask bytes for 3 weights"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), (1, 3))
    with pytest.raises(ValueError, match="1 values for 2 set bits"):
        unpack_weight(bits, values[:1], (1, 3))
    with pytest.raises(ValueError, match="3 values for 2 set bits"):
        unpack_weight(bits, torch.cat([values, values[:1]]), (1, 3))


def test_bits_equal_numpys() -> None:
    keep = torch.rand(31, 13, generator=torch.Generator().manual_seed(0)) > 0.5
    assert pack_mask(keep).numpy().tobytes() == np.packbits(keep.numpy(), bitorder="little").tobytes()
