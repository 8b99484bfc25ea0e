"""Weights on large pages: the same bits at other addresses, where the system has such pages."""

import mmap
from typing import Any

import pytest
import torch

from billhook_kernels.packed import PackedLinear, pack_rows, settle_layers
from billhook_kernels.pages import ALIGNMENT, LARGE_PAGE, count_room, move_to_large_pages

linux_only = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no large pages")


def make_tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (600_001,), generator=generator).int()
    return [
        bits,
        bits[:77].view(torch.float32),
        bits[:0],
        bits[:31].view(torch.int16).view(31, 2),
        bits.view(600_001, 1),
    ]


@linux_only
def test_copies_lie_one_behind_another_with_the_same_bits() -> None:
    tensors = make_tensors()
    room = count_room(tensors)
    assert room > LARGE_PAGE
    copies = list(move_to_large_pages(iter(tensors), room))
    assert [(copy.dtype, copy.shape) for copy in copies] == [(tensor.dtype, tensor.shape) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(copy.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    at = copies[0].data_ptr()
    assert at % LARGE_PAGE == 0 and at != tensors[0].data_ptr()
    for copy in copies:
        assert copy.numel() == 0 or copy.data_ptr() == at
        at += -(-copy.nbytes // ALIGNMENT) * ALIGNMENT
    copies[0].zero_()
    assert tensors[0].any() and torch.equal(copies[4], tensors[4])


@pytest.mark.parametrize("why", ["little", "no such pages"])
def test_where_it_is_not_worth_it_nothing_moves(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors()[1:4] if why == "little" else make_tensors()
    if why != "little":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert all(a is b for a, b in zip(tensors, move_to_large_pages(tensors, count_room(tensors)), strict=True))


@linux_only
def test_a_kernel_without_them_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory(mmap.mmap):
        def madvise(self, *arguments: Any) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Memory)
    tensors = make_tensors()
    copies = list(move_to_large_pages(tensors, count_room(tensors)))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True) if a.dtype != torch.float32)


@linux_only
def test_settled_layers_give_the_same_products() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(1100, 1000, generator=generator).bfloat16() for _ in range(2)]
    for weight in weights:
        weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.5, 0)
    layers = [PackedLinear(pack_rows(weight)) for weight in weights]
    x = torch.randn(2, 1000, generator=generator).bfloat16()
    before = [layer(x) for layer in layers]
    places = [layer.values.data_ptr() for layer in layers]
    settle_layers(layers)
    assert all(layer.values.data_ptr() != place for layer, place in zip(layers, places, strict=True))
    assert layers[0].mask_OW.data_ptr() % LARGE_PAGE == 0
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, before, strict=True))
