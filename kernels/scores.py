"""How much a weight matters, by three views. Shape suffixes: O output features, I input features."""

from torch import Tensor


def score_wanda(weight_OI: Tensor, mean_square_I: Tensor) -> Tensor:
    """|W_ij| * sqrt(a_j), fp32 (Wanda, arXiv 2306.11695 eq. 1), a = mean square of each input over tokens."""
    return weight_OI.float().abs() * mean_square_I.float().sqrt()


def score_two_sided(weight_OI: Tensor, mean_square_I: Tensor, gradient_square_O: Tensor) -> Tensor:
    """W_ij^2 * a_j * gamma_i, fp32: the diagonal second-order change of the loss, up to a factor.

    a and gamma are divided by their means first, so that the product stays inside fp32's range; the order of the
    weights of one layer does not change.
    """
    a_I = mean_square_I.float() / mean_square_I.float().mean().clamp(min=1e-30)
    gamma_O = gradient_square_O.float() / gradient_square_O.float().mean().clamp(min=1e-30)
    return weight_OI.float().square() * a_I * gamma_O[:, None]
