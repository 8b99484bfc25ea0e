"""How much a weight matters, by three views. Shape suffixes: O output features, I input features."""

import torch
from torch import Tensor


def score_wanda(weight_OI: Tensor, mean_square_I: Tensor) -> Tensor:
    """|W_ij| * sqrt(a_j), fp32 (Wanda, arXiv 2306.11695 eq. 1), a = mean square of each input over tokens."""
    return weight_OI.float().abs() * mean_square_I.float().sqrt()


def score_two_sided(weight_OI: Tensor, mean_square_I: Tensor, gradient_square_O: Tensor) -> Tensor:
    """W_ij^2 * a_j * gamma_i, fp32: the diagonal second-order change of the loss, up to a factor.

    a and gamma are brought near 1 first, so that the product stays inside fp32's range. By a power of two: that rounds
    nothing, so that the order of the weights, ties too, does not hang on how a machine sums up the mean.
    """
    return weight_OI.float().square() * _scale(mean_square_I) * _scale(gradient_square_O)[:, None]


def _scale(square: Tensor) -> Tensor:
    square = square.float()
    return torch.ldexp(square, -torch.frexp(square.mean().clamp(min=1e-30)).exponent)
