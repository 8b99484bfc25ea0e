"""Scores as integers that sort the same way, and their order statistics."""

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import choose_kernel

INFINITY = 0x7F800000
"""Bits of +inf: every finite non-negative fp32 has a smaller pattern."""

NO_SCORE = "a pruning score is negative or not finite"


def score_bits(score: Tensor) -> Tensor:
    """Non-negative int32, a new tensor, that sort like the non-negative scores (fp32).

    Non-negative IEEE floats order like their bits. Raises ValueError when a score is negative or not finite.
    """
    bits = (score.float() + 0.0).contiguous().view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    if bits.numel() and (int(bits.min()) < 0 or int(bits.max()) >= INFINITY):
        raise ValueError(NO_SCORE)
    return bits


def order_preserving_ints(score: Tensor, dead: Tensor) -> Tensor:
    """`score_bits`, but `dead` weights are 0 and all others above it."""
    return score_bits(score).add_(1).mul_(~dead)


def kth_smallest(ranks_RN: Tensor, k: int) -> Tensor:
    """The k-th smallest (k from 1) of each row of ranks that are at least 0: shape (R,)."""
    if choose_kernel(ranks_RN.device) == "triton":
        from kernels import triton_masks

        return triton_masks.select_kth(ranks_RN, k)
    if ranks_RN.device.type == "cpu":  # numpy's partition is several times faster than torch.kthvalue here
        return torch.from_numpy(np.partition(ranks_RN.numpy(), k - 1, axis=1)[:, k - 1].copy())
    return torch.kthvalue(ranks_RN, k, dim=1).values
