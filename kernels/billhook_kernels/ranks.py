"""Scores as integers that sort the same way."""

import torch
from torch import Tensor

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
