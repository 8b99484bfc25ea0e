"""A sparse weight as one bit per weight and its non-zero values, row by row.

Bit-exact both ways: what is left out is +0.0 alone, so that negative zeros and the payloads of NaNs come back. Where
it lies on disk is `kernels/FORMAT.md`.

Shape suffixes: O output features (rows), I input features (columns), W = ceil(I / 32) words of a mask row,
N non-zero values.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from billhook_kernels.dispatch import choose_kernel


def list_kept(keep_OI: Tensor) -> Tensor:
    """Places of what a mask (bool) keeps, in the weight as one row: int64 (S,), ascending, on its device."""
    if keep_OI.device.type == "cpu":  # numpy takes an eighth of torch's time
        return torch.from_numpy(np.flatnonzero(keep_OI.numpy()))
    return keep_OI.flatten().nonzero()[:, 0]


def gather_kept(full_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """What stays of a tensor of any dtype: (S,)."""
    return full_OI.reshape(-1).index_select(0, list_kept(keep_OI))


def spread_kept(values_S: Tensor, keep_OI: Tensor) -> Tensor:
    """The weight with these values where the mask keeps one, bit for bit, and zeros elsewhere: (O, I).

    Values behind the last that is needed are left. Raises IndexError where there are too few.
    """
    places_S, full_N = list_kept(keep_OI), values_S.new_zeros(keep_OI.numel())
    return full_N.index_copy_(0, places_S, values_S[: len(places_S)]).view(keep_OI.shape)


WORD = 32
"""Bits of a word of the mask."""

PADDING = 32
"""Zeros behind the last value: a kernel may load a whole word's values wherever one begins."""

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""What can be packed, and the integers of the same width."""


class PackedWeight(NamedTuple):
    """A weight (O, I) that `pack_rows` made or `check_packed` let through."""

    mask_OW: Tensor
    """int32: bit j of word w is 1 where W[o, 32 w + j] is kept; bits from I on are 0."""
    values: Tensor
    """(N + PADDING,): the kept values row by row, then zeros."""
    offsets_O: Tensor
    """int64: where the values of each row begin."""
    columns: int
    """I."""


def find_kept(weight_OI: Tensor) -> Tensor:
    """Which weights are packed: bool, False for +0.0 alone. Raises ValueError for a dtype or shape that cannot be."""
    if weight_OI.dtype not in BITS or weight_OI.ndim != 2 or 0 in weight_OI.shape:
        raise ValueError(f"a weight {tuple(weight_OI.shape)} of {weight_OI.dtype} cannot be packed")
    return weight_OI.contiguous().view(BITS[weight_OI.dtype]) != 0


def pack_mask(keep_OI: Tensor) -> Tensor:
    """The words of a mask (bool), as `PackedWeight` has them, on its device."""
    if choose_kernel(keep_OI.device) == "triton":
        from billhook_kernels import triton_packed

        return triton_packed.pack_bits(keep_OI)[0]
    padded = F.pad(keep_OI, (0, -keep_OI.shape[1] % WORD)).cpu().numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32)).to(keep_OI.device)


def pack_bits(keep: Tensor) -> Tensor:
    """Eight bits of a mask a byte, without gaps between its rows, lowest bit first: uint8, ceil(n / 8), on the CPU.

    It is what hashes of masks are made of.
    """
    return pack_mask(keep.reshape(1, -1)).cpu().flatten().view(torch.uint8)[: -(-keep.numel() // 8)].clone()


def pack_rows(weight_OI: Tensor) -> PackedWeight:
    """Pack a weight of bf16, fp16 or fp32, on its device. Raises ValueError for another dtype or shape."""
    keep_OI, columns = find_kept(weight_OI), weight_OI.shape[1]
    if choose_kernel(weight_OI.device) == "triton":
        from billhook_kernels import triton_packed

        mask_OW, counts_OK = triton_packed.pack_bits(keep_OI)
        return PackedWeight(mask_OW, *triton_packed.collect_kept(weight_OI, keep_OI, counts_OK, PADDING), columns)
    kept = gather_kept(weight_OI, keep_OI)
    values = torch.cat([kept, kept.new_zeros(PADDING)])
    counts_O = keep_OI.sum(1)
    return PackedWeight(pack_mask(keep_OI), values, counts_O.cumsum(0) - counts_O, columns)


def check_mask(mask_OW: Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError, in one line, where a tensor on the CPU is no mask of a weight of this shape (O, I)."""
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise ValueError(f"a weight of shape {shape} has no values")
    words = -(-columns // WORD)
    if mask_OW.dtype != torch.int32 or tuple(mask_OW.shape) != (rows, words):
        raise ValueError(
            f"the mask is {mask_OW.dtype} {tuple(mask_OW.shape)} and not torch.int32 {(rows, words)}, as {shape} needs"
        )
    if columns % WORD and (mask_OW[:, -1].numpy().view(np.uint32) >> np.uint32(columns % WORD)).any():
        raise ValueError("the mask has bits behind its last column")


def check_packed(mask_OW: Tensor, values: Tensor, shape: tuple[int, int]) -> PackedWeight:
    """The packed weight of a shape (O, I) in tensors on the CPU that nobody vouches for.

    After this no kernel reads outside of them. Raises ValueError, in one line, that says what is wrong.
    """
    check_mask(mask_OW, shape)
    if values.dtype not in BITS or values.ndim != 1:
        raise ValueError(f"the values are {values.dtype} of {values.ndim} dimensions, which cannot be")
    mask_OW, values = mask_OW.contiguous(), values.contiguous()
    counts_O = torch.from_numpy(np.bitwise_count(mask_OW.numpy().view(np.uint32)).sum(1, dtype=np.int64))
    if int(counts_O.sum()) + PADDING != values.numel():
        raise ValueError(f"{values.numel()} values for {int(counts_O.sum())} set bits and {PADDING} of padding")
    if values[-PADDING:].view(BITS[values.dtype]).any():
        raise ValueError("the padding behind the values is not zero")
    return PackedWeight(mask_OW, values, counts_O.cumsum(0) - counts_O, shape[1])


def unpack_mask(mask_OW: Tensor, columns: int) -> Tensor:
    """The mask again: bool (O, I), on its device."""
    bytes_OB = mask_OW.contiguous().view(torch.uint8)
    if mask_OW.device.type == "cpu":  # numpy takes a hundredth of torch's time
        return torch.from_numpy(np.unpackbits(bytes_OB.numpy(), axis=1, count=columns, bitorder="little")).bool()
    shifts = torch.arange(8, dtype=torch.uint8, device=mask_OW.device)
    return ((bytes_OB[..., None] >> shifts) & 1).bool().flatten(1)[:, :columns]


def unpack_rows(packed: PackedWeight) -> Tensor:
    """The weight (O, I) again, on its device."""
    mask_OW, values, offsets_O, columns = packed
    return spread_kept(values[int(offsets_O[0]) :], unpack_mask(mask_OW, columns))
