"""Cut whole input channels of a layer: how much each one matters, and the least-squares fit of those that stay.

A unit is a run of neighbouring channels that go together: one neuron, or all channels of a group of attention heads.

Shape suffixes: T tokens, O output features, I input channels, K input channels that stay, U units.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.guard import DAMPING, escalate, find_low

DAMPINGS = (0.02, 0.06, 0.2, 0.6, 2.0)
"""Shares of mean(diag A) that are tried on half of the text.

Of a fit, SparseGPT's DAMPING on 4,096 tokens left SmolLM2-135M without 408 of 1,536 neurons of every block a KL of
0.651; ten times as much 0.566, forty times as much 0.544.
"""


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
    halves: "tuple[InputMoments, InputMoments] | None" = None
    """The same over every other batch, where there were several."""


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


class HalvedSums:
    """MomentSums of every other batch, and of those between: a fit to one half can be judged by the other."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self._halves = [MomentSums(channels, device), MomentSums(channels, device)]
        self._batches = 0

    @property
    def tokens(self) -> int:
        """Of all batches."""
        return sum(half.tokens for half in self._halves)

    def add(self, x_TI: Tensor, extra_TO: Tensor | None = None) -> None:
        """Count a batch of tokens; `extra_TO` with every batch or with none."""
        self._halves[self._batches % 2].add(x_TI, extra_TO)
        self._batches += 1

    def finish(self) -> InputMoments:
        """The moments; the sums are used up. Raises ValueError when they are not finite."""
        counted = [half for half in self._halves if half.tokens]
        share = counted[0].tokens / self.tokens
        halves = [half.finish() for half in counted]
        return _merge(halves[0], halves[1], share) if len(halves) > 1 else halves[0]


def _merge(first: InputMoments, second: InputMoments, share: float) -> InputMoments:
    """The moments over both, of which the first are those of a `share` of the tokens."""

    def mix(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else share * one + (1 - share) * other

    mean_I = share * first.mean_I + (1 - share) * second.mean_I
    squares = [own.variance_I + own.mean_I.square() for own in (first, second)]
    return InputMoments(
        mean_I,
        (share * squares[0] + (1 - share) * squares[1] - mean_I.square()).clamp(min=0),
        share * first.second_moment_II + (1 - share) * second.second_moment_II,
        mix(first.extra_mean_O, second.extra_mean_O),
        mix(first.extra_moment_OI, second.extra_moment_OI),
        (first, second),
    )


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
    inverse_II = torch.cholesky_inverse(_factor_damped(moment_II, DAMPING * mean)[0])
    width = weight_OI.shape[1] // units
    scores = []
    for start in range(0, weight_OI.shape[1], width):
        run = slice(start, start + width)
        part_OR = weight_OI[:, run].double()
        scores.append((torch.linalg.solve(inverse_II[run, run], part_OR.T).T * part_OR).sum())
    return torch.stack(scores)


class Elimination(NamedTuple):
    """Units of a layer's inputs, one after another taken away."""

    order_R: Tensor
    """In the order in which they went."""
    cost_R: Tensor
    """What all up to each one cost together; fp64."""


def eliminate_units(
    weight_OI: Tensor,
    moments: InputMoments,
    metric_OO: Tensor,
    units: int,
    removed: int,
    *,
    biased: bool,
    together: int = 1,
) -> Elimination:
    """Take away, greedily, the `removed` of `units` equal runs of channels that cost least, the rest fitted each time.

    A set S of channels costs tr(dW^T F dW A) / 2 = tr(W_S^T F W_S (P_SS)^-1) / 2 when the others make up for it, with
    A damped by d = DAMPING * mean(diag A), P its inverse, and F = `metric_OO`, (O, O), what an error of the outputs
    costs: where F is the second moment of the gradients of -log p at the layer's outputs, p drawn from the model, this
    is the second-order term of KL(dense || cut), nats per token. When S is gone, W and P are those of the rest (Optimal
    Brain Surgeon; of columns: ZipLM, arXiv 2302.04089). No step reads W: M = W^T F W and P tell all costs.

    Damped thirty times as much, as a fit is, the order is no better: SmolLM2-135M without 256 of 1,536 neurons of every
    block has 2.7 % more KL (standard error 2.2 %), and costs are twelve times as high.

    The `together` cheapest go at a time, and each bears the same share of what they cost together. With a bias A is
    taken around the means. Raises ValueError where A cannot be factored, whatever the damping.
    """
    moment_II, width = _centre(moments, biased), weight_OI.shape[1] // units
    mean = float(moment_II.diagonal().mean())
    if mean <= 0:
        gone_R = torch.arange(removed, device=weight_OI.device)
        return Elimination(gone_R, torch.zeros(removed, dtype=torch.float64, device=weight_OI.device))
    inverse_II = torch.cholesky_inverse(_factor_damped(moment_II, DAMPING * mean)[0])
    rest = _Rest(weight_OI.double(), metric_OO.double(), inverse_II, units, removed)
    order: list[int] = []
    costs: list[float] = []
    while len(order) < removed:
        price_U = rest.price_units()
        price_U[order] = torch.inf
        chosen_N = price_U.sort(stable=True).indices[: min(together, removed - len(order))]
        price = rest.take_away(chosen_N, expand_units(chosen_N, width))
        costs += [price / len(chosen_N)] * len(chosen_N)
        order += chosen_N.tolist()
    return Elimination(torch.tensor(order, device=weight_OI.device), inverse_II.new_tensor(costs).cumsum(0))


class _Rest:
    """M and P of the channels that are left, from those of all: P - Y^T Y, and M - Z^T Y - Y^T Z.

    A row of Y and Z for each channel that is gone, and only the rows of M and P that are asked for are made: for r of n
    channels that takes 3 n r^2 products, where both kept up to date take 6 n^2 r.
    """

    def __init__(self, weight_OI: Tensor, metric_OO: Tensor, inverse_II: Tensor, units: int, removed: int) -> None:
        channels = len(inverse_II)
        width = channels // units
        self._weight_OI, self._told_OI, self._inverse_II = weight_OI, metric_OO @ weight_OI, inverse_II
        self._y_RI = inverse_II.new_empty(removed * width, channels)
        self._z_RI = torch.empty_like(self._y_RI)
        self._gone = 0
        own = torch.arange(units, device=inverse_II.device)
        self._inverse_UCC = inverse_II.view(units, width, units, width)[own, :, own].clone()
        self._cost_UCC = _multiply_units(weight_OI, self._told_OI, units)

    def price_units(self) -> Tensor:
        """What each unit costs alone: tr(M_uu (P_uu)^-1) / 2, shape (U,); 0 of those that are gone."""
        price_U: Tensor = torch.linalg.solve(self._inverse_UCC, self._cost_UCC).diagonal(dim1=1, dim2=2).sum(1) / 2
        return price_U

    def take_away(self, units_N: Tensor, gone_S: Tensor) -> float:
        """What the channels `gone_S` of some units cost together, which are then gone."""
        y_RI, z_RI = self._y_RI[: self._gone], self._z_RI[: self._gone]
        inverse_SI = self._inverse_II[gone_S] - y_RI[:, gone_S].T @ y_RI
        cost_SI = self._weight_OI[:, gone_S].T @ self._told_OI
        cost_SI -= z_RI[:, gone_S].T @ y_RI
        cost_SI -= y_RI[:, gone_S].T @ z_RI
        lower_SS = torch.linalg.cholesky(inverse_SI[:, gone_S])
        y_SI, z_SI = (torch.linalg.solve_triangular(lower_SS, x_SI, upper=False) for x_SI in (inverse_SI, cost_SI))
        price_SS = torch.linalg.solve_triangular(lower_SS, z_SI[:, gone_S].T, upper=False)
        z_SI -= price_SS @ y_SI / 2

        end = self._gone + len(gone_S)
        self._y_RI[self._gone : end], self._z_RI[self._gone : end] = y_SI, z_SI
        self._gone = end
        self._inverse_UCC -= _multiply_units(y_SI, y_SI, len(self._inverse_UCC))
        both_UCC = _multiply_units(z_SI, y_SI, len(self._cost_UCC))
        self._cost_UCC -= both_UCC + both_UCC.mT
        self._cost_UCC[units_N] = 0
        self._inverse_UCC[units_N] = torch.eye(self._inverse_UCC.shape[-1], dtype=y_SI.dtype, device=y_SI.device)
        return float(price_SS.trace()) / 2


def _multiply_units(one_NI: Tensor, other_NI: Tensor, units: int) -> Tensor:
    """The product of one's transpose and the other where both are of a unit: (U, C, C), C channels a unit."""
    return torch.einsum("nuc,nud->ucd", *(x_NI.unflatten(1, (units, -1)) for x_NI in (one_NI, other_NI)))


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

    Minimises mean |(W x + b + e) - (W' x_K + b')|^2 + d |W' - W_:,K|^2, exactly: all rows share the mask, so one
    Cholesky (fp64) serves them all. d is the share of mean(diag A) that `choose_damping` finds. With a bias the fit is
    made around the means, and the bias takes what they shift: for W' = W_:,K that is FLAP's compensation, W times the
    mean of what went. Without a bias the channels that stay take what they can of the shift, and no bias is added. e is
    0 without extra moments.

    The damping escalates where the factorisation fails; ValueError when nothing helps.
    """
    weight_OI, given = weight_OI.double(), weight_OI
    share = choose_damping(weight_OI, moments, kept_K, biased=bias_O is not None)
    fitted_OK = _solve(_set_up(weight_OI, moments, kept_K, biased=bias_O is not None), share)
    if bias_O is None:
        return fitted_OK.to(given.dtype), None
    shift_O = weight_OI @ moments.mean_I - fitted_OK @ moments.mean_I[kept_K]
    if moments.extra_mean_O is not None:
        shift_O += moments.extra_mean_O
    return fitted_OK.to(given.dtype), (bias_O.double() + shift_O).to(bias_O.dtype)


def choose_damping(weight_OI: Tensor, moments: InputMoments, kept_K: Tensor, *, biased: bool) -> float:
    """The share of mean(diag A) to damp a fit with: DAMPING, or one of DAMPINGS by the halves of the text.

    Of the fits to one half that which leaves the least error on the other; for a fit to both, half as much: what a
    ridge regression wants falls with the tokens (Hoerl and Kennard 1970). The error falls and then rises with the
    damping, so that from the middle of DAMPINGS only the way down is tried.
    """
    if moments.halves is None:
        return DAMPING
    # fp32, in which the sums are: shares are three times apart, and there are several to solve with
    first, second = (_set_up(weight_OI.float(), half, kept_K, biased=biased) for half in moments.halves)

    def measure(place: int) -> float:
        fitted_OK = _solve(first, DAMPINGS[place])
        return float(((fitted_OK @ second.moment_KK - 2 * second.target_OK) * fitted_OK).sum())

    return DAMPINGS[find_low(len(DAMPINGS) // 2, len(DAMPINGS), measure)] / 2


class _Equations(NamedTuple):
    """What a fit of the channels that stay solves, whatever its damping; in the dtype of the weight."""

    moment_KK: Tensor
    """A, around the means with a bias."""
    target_OK: Tensor
    """The mean of (W x + e) x^T, likewise."""
    towards_OK: Tensor
    """Their columns of W."""
    mean: float
    """mean(diag A), over all channels."""


def _set_up(weight_OI: Tensor, moments: InputMoments, kept_K: Tensor, *, biased: bool) -> _Equations:
    moment_II = _centre(moments, biased).to(weight_OI.dtype)
    mean, moment_IK = float(moment_II.diagonal().mean()), moment_II[:, kept_K]
    target_OK = weight_OI @ moment_IK
    if moments.extra_moment_OI is not None and moments.extra_mean_O is not None:
        target_OK += moments.extra_moment_OI[:, kept_K]
        if biased:
            target_OK -= torch.outer(moments.extra_mean_O, moments.mean_I[kept_K])
    return _Equations(moment_IK[kept_K], target_OK, weight_OI[:, kept_K], mean)


def _solve(equations: _Equations, share: float) -> Tensor:
    """W' of `fit_kept`, with a share of mean(diag A) as damping."""
    moment_KK, target_OK, towards_OK, mean = equations
    if mean <= 0:  # the layer never saw an input that moves: nothing to fit to
        return towards_OK
    lower_KK, damping = _factor_damped(moment_KK, share * mean)
    return torch.cholesky_solve((target_OK + damping * towards_OK).T, lower_KK).T


def _centre(moments: InputMoments, biased: bool) -> Tensor:
    """A in fp64; the covariance where a bias takes care of the means."""
    moment_II = moments.second_moment_II.double()
    return moment_II - torch.outer(moments.mean_I, moments.mean_I) if biased else moment_II


def _factor_damped(matrix_NN: Tensor, least: float) -> tuple[Tensor, float]:
    """(the lower Cholesky factor of M + d I, d): d = `least`, or as much more as it takes."""
    for damping in escalate(least):
        damped_NN = matrix_NN.clone()
        damped_NN.diagonal().add_(damping)
        lower_NN, failed = torch.linalg.cholesky_ex(damped_NN)
        if int(failed) == 0:
            return lower_NN, damping
    raise ValueError("the second moment is not positive definite, whatever the damping")
