"""Cut whole input channels of a layer: how much each one matters, and the least-squares fit of those that stay.

A unit is a run of neighbouring channels that go together: one neuron, or all channels of a group of attention heads.

Shape suffixes: T tokens, O output features, I input channels, K input channels that stay, U units.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.damping import DAMPING, escalate


class InputMoments(NamedTuple):
    """Moments of a layer's inputs over all tokens."""

    mean_I: Tensor
    """fp64."""
    variance_I: Tensor
    """fp64, of the whole population."""
    second_moment_II: Tensor
    """A = mean of x x^T, fp32."""
    extra_mean_O: Tensor | None = None
    """Of e, what the layer shall give beside its own output, if there is such a thing; fp64."""
    extra_moment_OI: Tensor | None = None
    """Mean of e x^T, fp32."""


class ChannelSums:
    """Sums of a layer's inputs, batch after batch."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.tokens = 0
        self.sum_I = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares_I = torch.zeros_like(self.sum_I)

    def add(self, x_TI: Tensor) -> None:
        """Count a batch of tokens."""
        self.tokens += len(x_TI)
        self.sum_I += x_TI.double().sum(0)
        self.squares_I += x_TI.double().square().sum(0)

    def spread(self) -> tuple[Tensor, Tensor]:
        """(mean, variance of the whole population) of every channel, fp64."""
        mean_I = self.sum_I / self.tokens
        return mean_I, (self.squares_I / self.tokens - mean_I.square()).clamp(min=0)


class MomentSums(ChannelSums):
    """Sums of a layer's inputs, of their products, and of what else it shall give, batch after batch."""

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__(channels, device)
        self.extra_O: Tensor | None = None
        self.extra_product_OI: Tensor | None = None
        self.product_II = torch.zeros(channels, channels, device=device)

    def add(self, x_TI: Tensor, extra_TO: Tensor | None = None) -> None:
        """Count a batch of tokens; `extra_TO` with every batch or with none."""
        super().add(x_TI)
        self.product_II.addmm_(x_TI.float().T, x_TI.float())

        if extra_TO is not None:
            if self.extra_O is None or self.extra_product_OI is None:
                self.extra_O = self.sum_I.new_zeros(extra_TO.shape[1])
                self.extra_product_OI = self.product_II.new_zeros(extra_TO.shape[1], x_TI.shape[1])
            self.extra_O += extra_TO.double().sum(0)
            self.extra_product_OI.addmm_(extra_TO.float().T, x_TI.float())

    def finish(self) -> InputMoments:
        """The moments; the sums are used up. Raises ValueError when they are not finite."""
        mean_I, variance_I = self.spread()
        moment_II = self.product_II.div_(self.tokens)
        if not bool(torch.isfinite(moment_II).all()):
            raise ValueError("the second moment is not finite")
        if self.extra_O is None or self.extra_product_OI is None:
            return InputMoments(mean_I, variance_I, moment_II)
        extras = self.extra_O / self.tokens, self.extra_product_OI.div_(self.tokens)
        return InputMoments(mean_I, variance_I, moment_II, *extras)


def score_fluctuation(weight_OI: Tensor, variance_I: Tensor) -> Tensor:
    """FLAP's fluctuation (arXiv 2312.11983): Var(x_j) * ||W_:,j||^2 of every channel, shape (I,), fp64."""
    return variance_I * weight_OI.double().square().sum(0)


def standardise(score_I: Tensor) -> Tensor:
    """FLAP's standardised scores: (s - mean) / standard deviation (of a sample), shape (I,); 0 where all are alike."""
    centred_I = score_I - score_I.mean()
    deviation = centred_I.square().sum().div(max(1, len(score_I) - 1)).sqrt()
    return centred_I / deviation if float(deviation) > 0 else centred_I


def score_residual(weight_OI: Tensor, moments: InputMoments, units: int, *, biased: bool) -> Tensor:
    """What no fit can restore when one of `units` equal runs of channels goes alone: shape (U,), fp64.

    The least value of what `fit_kept` minimises, tr(W_u (P_uu)^-1 W_u^T) with P = (A + d I)^-1; with a bias A is taken
    around the means.
    """
    moment_II = _centre(moments, biased)
    mean = float(moment_II.diagonal().mean())
    if mean <= 0:
        return moment_II.new_zeros(units)
    inverse_II = torch.cholesky_inverse(_factor_damped(moment_II, mean)[0])
    width = weight_OI.shape[1] // units
    scores = []
    for start in range(0, weight_OI.shape[1], width):
        run = slice(start, start + width)
        part_OR = weight_OI[:, run].double()
        scores.append((torch.linalg.solve(inverse_II[run, run], part_OR.T).T * part_OR).sum())
    return torch.stack(scores)


def keep_highest_units(score_U: Tensor, removed: int) -> Tensor:
    """Ascending indices of the units that stay when the `removed` lowest go, ties from the left."""
    return score_U.sort(stable=True).indices[removed:].sort().values


def mark_kept(score_U: Tensor, cost_U: Tensor, share: float) -> Tensor:
    """Which units stay when the highest-scored do whose costs together come nearest to `share` of all: bool, (U,).

    Ties from the left. FLAP's threshold over the whole model, with every unit counted as the weights that go with it.
    """
    order_U = score_U.sort(descending=True, stable=True).indices
    spent = torch.cat([cost_U.new_zeros(1), cost_U[order_U].cumsum(0)]).double()
    kept = int((spent - share * float(spent[-1])).abs().argmin())
    stays_U = torch.zeros(len(score_U), dtype=torch.bool, device=score_U.device)
    stays_U[order_U[:kept]] = True
    return stays_U


def expand_units(unit_U: Tensor, width: int) -> Tensor:
    """The channels of some units, each `width` channels wide, in the same order."""
    return (unit_U[:, None] * width + torch.arange(width, device=unit_U.device)).flatten()


def fit_kept(
    weight_OI: Tensor, bias_O: Tensor | None, moments: InputMoments, kept_K: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(W', b'): the least-squares fit of the layer's output from the channels that stay, in the weight's dtype.

    Minimises mean |(W x + b + e) - (W' x_K + b')|^2 + d |W' - W_:,K|^2, d = DAMPING * mean(diag A), exactly: all rows
    share the mask, so one Cholesky (fp64) serves them all. With a bias the fit is made around the means, and the bias
    takes what they shift: for W' = W_:,K that is FLAP's compensation, W times the mean of what went. Without a bias
    the channels that stay take what they can of the shift, and no bias is added. e is 0 without extra moments.

    The damping escalates where the factorisation fails; ValueError when nothing helps.
    """
    weight_OI, given = weight_OI.double(), weight_OI
    moment_II, mean_I = _centre(moments, bias_O is not None), moments.mean_I
    target_OI = weight_OI @ moment_II
    if moments.extra_moment_OI is not None and moments.extra_mean_O is not None:
        target_OI += moments.extra_moment_OI
        if bias_O is not None:
            target_OI -= torch.outer(moments.extra_mean_O, mean_I)
    fitted_OK = _solve_damped(
        moment_II[kept_K][:, kept_K], target_OI[:, kept_K], weight_OI[:, kept_K], float(moment_II.diagonal().mean())
    )
    if bias_O is None:
        return fitted_OK.to(given.dtype), None
    shift_O = weight_OI @ mean_I - fitted_OK @ mean_I[kept_K]
    if moments.extra_mean_O is not None:
        shift_O += moments.extra_mean_O
    return fitted_OK.to(given.dtype), (bias_O.double() + shift_O).to(bias_O.dtype)


def _centre(moments: InputMoments, biased: bool) -> Tensor:
    """A in fp64; the covariance where a bias takes care of the means."""
    moment_II = moments.second_moment_II.double()
    return moment_II - torch.outer(moments.mean_I, moments.mean_I) if biased else moment_II


def _solve_damped(matrix_KK: Tensor, target_OK: Tensor, towards_OK: Tensor, mean: float) -> Tensor:
    """X with X (M + d I) = target + d * towards."""
    if mean <= 0:  # the layer never saw an input that moves: nothing to fit to
        return towards_OK
    lower_KK, damping = _factor_damped(matrix_KK, mean)
    return torch.cholesky_solve((target_OK + damping * towards_OK).T, lower_KK).T


def _factor_damped(matrix_NN: Tensor, mean: float) -> tuple[Tensor, float]:
    """(the lower Cholesky factor of M + d I, d): d = DAMPING * mean, or as much more as it takes."""
    for damping in escalate(DAMPING * mean):
        damped_NN = matrix_NN.clone()
        damped_NN.diagonal().add_(damping)
        lower_NN, failed = torch.linalg.cholesky_ex(damped_NN)
        if int(failed) == 0:
            return lower_NN, damping
    raise ValueError("the second moment is not positive definite, whatever the damping")
