"""A pruned weight as one bit per weight and the survivors, bit-exact both ways."""

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import choose_kernel


def pack_mask(keep: Tensor) -> Tensor:
    """Eight mask bits a byte, row-major, lowest bit first: uint8, ceil(n / 8) bytes, on the CPU."""
    if keep.numel() and choose_kernel(keep.device) == "triton":
        from kernels import triton_packed

        words = triton_packed.pack_bits(keep.reshape(1, -1))[0]
        return words.cpu().flatten().view(torch.uint8)[: -(-keep.numel() // 8)].clone()
    return torch.from_numpy(np.packbits(keep.cpu().numpy().reshape(-1), bitorder="little"))


def unpack_mask(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_mask`: bool of `shape`. Raises ValueError when the number of bytes does not fit."""
    count = shape[0] * shape[1]
    if bits.numel() != -(-count // 8):
        raise ValueError(f"{bits.numel()} mask bytes for {count} weights")
    flat = np.unpackbits(bits.numpy(), count=count, bitorder="little")
    return torch.from_numpy(flat).bool().reshape(shape)


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(mask bits, non-zero values in row-major order); a negative zero counts as zero."""
    keep = weight != 0
    return pack_mask(keep), weight[keep].cpu()


def unpack_weight(bits: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight again, on CPU. Raises ValueError when mask and values disagree."""
    keep = unpack_mask(bits, shape)
    if int(keep.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for {int(keep.sum())} set bits")
    weight = torch.zeros(shape, dtype=values.dtype)
    weight.masked_scatter_(keep, values)  # `weight[keep] = values` rewrites a lone NaN
    return weight
