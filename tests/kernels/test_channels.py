"""Scores and fits of whole channels against NumPy in float64."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from billhook_kernels.channels import (
    DAMPINGS,
    HalvedSums,
    InputMoments,
    MomentSums,
    choose_damping,
    eliminate_units,
    expand_units,
    fit_kept,
    keep_highest_units,
    mark_kept,
    score_fluctuation,
    score_residual,
    standardise,
)
from billhook_kernels.guard import DAMPING

Array = NDArray[np.float64]
ROWS, CHANNELS, TOKENS = 7, 24, 300
KEPT = torch.tensor([0, 1, 4, 5, 6, 9, 10, 12, 15, 16, 17, 20, 22, 23])


class Case(NamedTuple):
    """A layer, what it reads, and something else that it shall give."""

    weight: Tensor
    bias: Tensor
    x: Tensor
    extra: Tensor


def make_case(seed: int = 0) -> Case:
    """Correlated channels, each with a mean of its own, some of them loud."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(CHANNELS, CHANNELS, generator=generator) / CHANNELS**0.5 + torch.eye(CHANNELS)
    x = torch.randn(TOKENS, CHANNELS, generator=generator) @ mix + 2 * torch.randn(CHANNELS, generator=generator)
    x[:, ::9] *= 5
    weight = torch.randn(ROWS, CHANNELS, generator=generator)
    extra = x[:, :ROWS].square() + torch.randn(TOKENS, ROWS, generator=generator)
    return Case(weight, torch.randn(ROWS, generator=generator), x, extra)


def sum_up(x: Tensor, extra: Tensor | None = None) -> InputMoments:
    """The moments, counted in two batches."""
    sums = MomentSums(x.shape[1], x.device)
    for part in (slice(0, 100), slice(100, None)):
        sums.add(x[part], None if extra is None else extra[part])
    return sums.finish()


def solve(case: Case, kept: Tensor, *, biased: bool, extra: bool = False) -> tuple[Array, Array, float]:
    """(W', b', the damped mean squared error): least squares over tokens, and a row for each damped weight."""
    x, weight = case.x.double().numpy(), case.weight.double().numpy()
    target = x @ weight.T + (case.bias.double().numpy() if biased else 0)
    target = target + case.extra.double().numpy() if extra else target
    spread = x - x.mean(0) if biased else x
    damping = np.sqrt(TOKENS * DAMPING * (spread**2).mean())
    rows = np.concatenate([x[:, kept], damping * np.eye(len(kept))])
    if biased:
        rows = np.concatenate([rows, np.r_[np.ones(TOKENS), np.zeros(len(kept))][:, None]], axis=1)
    target = np.concatenate([target, damping * weight[:, kept].T])
    fitted = np.linalg.lstsq(rows, target, rcond=None)[0]
    error = float(((rows @ fitted - target) ** 2).sum() / TOKENS)
    return fitted[: len(kept)].T, fitted[len(kept)] if biased else np.zeros(ROWS), error


def mean_square_error(case: Case, kept: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Mean over tokens of |(W x + b) - (W' x_K + b')|^2; both biases 0 where there is none."""
    wanted = case.x @ case.weight.T + (0 if bias is None else case.bias)
    return float((wanted - case.x[:, kept] @ weight.T - (0 if bias is None else bias)).square().sum(1).mean())


def test_moments_of_batches_are_those_of_all_tokens() -> None:
    case = make_case()
    moments = sum_up(case.x, case.extra)
    x, extra = case.x.double().numpy(), case.extra.double().numpy()
    np.testing.assert_allclose(moments.mean_I, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance_I, x.var(0), rtol=1e-9)
    np.testing.assert_allclose(moments.second_moment_II, x.T @ x / TOKENS, rtol=1e-4, atol=1e-5)
    assert moments.extra_mean_O is not None and moments.extra_moment_OI is not None
    np.testing.assert_allclose(moments.extra_mean_O, extra.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.extra_moment_OI, extra.T @ x / TOKENS, rtol=1e-4, atol=1e-3)


def test_a_small_variance_about_a_large_mean_is_not_lost() -> None:
    x = 1000 + 0.01 * torch.randn(TOKENS, 3, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(sum_up(x).variance_I, x.double().numpy().var(0), rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"^the second moment is not finite$"):
        sum_up(torch.full((TOKENS, 3), value))


def test_fluctuation_is_variance_times_the_column_s_length() -> None:
    case = make_case()
    slow = []
    for j in range(CHANNELS):
        values = [float(v) for v in case.x[:, j]]
        mean = sum(values) / TOKENS
        variance = sum((v - mean) ** 2 for v in values) / TOKENS
        slow.append(variance * sum(float(w) ** 2 for w in case.weight[:, j]))
    np.testing.assert_allclose(score_fluctuation(case.weight, sum_up(case.x).variance_I), slow, rtol=1e-9)


def test_standardised_scores_have_mean_zero_and_deviation_one() -> None:
    scores = make_case().x[0].double()
    slow = (scores.numpy() - scores.numpy().mean()) / scores.numpy().std(ddof=1)
    np.testing.assert_allclose(standardise(scores), slow, rtol=1e-12)
    assert standardise(torch.full((5,), 3.0)).tolist() == [0.0] * 5
    assert standardise(torch.ones(1)).tolist() == [0.0]


@pytest.mark.parametrize(
    ("share", "stays"),
    [(1.0, "0123"), (0.0, ""), (0.5, "13"), (0.74, "13"), (0.76, "013"), (0.94, "013"), (0.96, "0123"), (0.1, "")],
)
def test_the_highest_units_stay_whose_costs_come_nearest(share: float, stays: str) -> None:
    scores, costs = torch.tensor([1.0, 2.0, 0.5, 2.0]), torch.tensor([3.0, 3.0, 1.0, 3.0])
    assert "".join(map(str, mark_kept(scores, costs, share).nonzero()[:, 0].tolist())) == stays


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("units", [4, 24])
def test_residual_is_the_least_error_without_the_unit(units: int, biased: bool) -> None:
    case = make_case()
    width = CHANNELS // units
    slow = []
    for unit in range(units):
        gone = slice(unit * width, (unit + 1) * width)
        kept = torch.cat([torch.arange(CHANNELS)[: gone.start], torch.arange(CHANNELS)[gone.stop :]])
        spread = case.x.double() - (case.x.double().mean(0) if biased else 0)
        shrunk = DAMPING * float(spread.square().mean()) * float(case.weight[:, gone].double().square().sum())
        slow.append(solve(case, kept, biased=biased)[2] + shrunk)  # what went is damped towards itself too
    scores = score_residual(case.weight, sum_up(case.x), units, biased=biased)
    np.testing.assert_allclose(scores, slow, rtol=1e-4)


def test_a_layer_that_sees_nothing_has_no_residual() -> None:
    assert score_residual(torch.ones(2, 6), sum_up(torch.zeros(TOKENS, 6)), 3, biased=False).tolist() == [0, 0, 0]


def test_the_lowest_units_go_and_ties_go_from_the_left() -> None:
    assert keep_highest_units(torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0]), 2).tolist() == [0, 3, 4]
    assert keep_highest_units(torch.tensor([3.0, 1.0]), 0).tolist() == [0, 1]


def test_units_are_runs_of_channels() -> None:
    assert expand_units(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_without_a_bias_it_is_damped_least_squares() -> None:
    case = make_case()
    weight, bias = fit_kept(case.weight, None, sum_up(case.x), KEPT)
    assert bias is None and weight.dtype == torch.float32
    np.testing.assert_allclose(weight, solve(case, KEPT, biased=False)[0], rtol=1e-3, atol=1e-4)


def test_with_a_bias_it_is_damped_least_squares_with_an_intercept() -> None:
    case = make_case()
    weight, bias = fit_kept(case.weight, case.bias, sum_up(case.x), KEPT)
    wanted = solve(case, KEPT, biased=True)
    assert bias is not None
    np.testing.assert_allclose(weight, wanted[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(bias, wanted[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("biased", [False, True])
def test_what_else_the_layer_shall_give_is_fitted_too(biased: bool) -> None:
    case = make_case()
    weight, bias = fit_kept(case.weight, case.bias if biased else None, sum_up(case.x, case.extra), KEPT)
    wanted = solve(case, KEPT, biased=biased, extra=True)
    np.testing.assert_allclose(weight, wanted[0], rtol=1e-3, atol=2e-2)
    if biased:
        assert bias is not None
        np.testing.assert_allclose(bias, wanted[1], rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("biased", [False, True])
def test_the_fit_is_better_than_the_cut(biased: bool) -> None:
    case = make_case()
    given = case.bias if biased else None
    fitted = fit_kept(case.weight, given, sum_up(case.x), KEPT)
    assert mean_square_error(case, KEPT, *fitted) < 0.9 * mean_square_error(case, KEPT, case.weight[:, KEPT], given)


def test_a_constant_channel_goes_into_the_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 4, generator=generator)
    x[:, 3] = 5
    weight, bias = fit_kept(torch.ones(2, 4), torch.zeros(2), sum_up(x), torch.arange(3))
    assert bias is not None
    np.testing.assert_allclose(weight, np.ones((2, 3)), atol=1e-5)
    np.testing.assert_allclose(bias, [5, 5], atol=1e-5)


def test_a_layer_that_sees_nothing_keeps_its_columns() -> None:
    case = make_case()
    weight, _ = fit_kept(case.weight, None, sum_up(torch.zeros_like(case.x)), KEPT)
    assert torch.equal(weight, case.weight[:, KEPT])


def test_the_result_has_the_weight_s_dtype() -> None:
    case = make_case()
    weight, bias = fit_kept(case.weight.bfloat16(), case.bias.bfloat16(), sum_up(case.x.bfloat16()), KEPT)
    assert bias is not None and weight.dtype == bias.dtype == torch.bfloat16


def test_the_damping_escalates_where_the_factorisation_fails() -> None:
    diagonal = torch.tensor([4.0, 4.0, 4.0, -0.5])  # rounding may leave a moment that is not quite one
    moments = InputMoments(torch.zeros(4).double(), torch.ones(4).double(), diagonal.diag())
    weight, _ = fit_kept(torch.ones(1, 4), None, moments, torch.tensor([0, 3]))
    assert torch.isfinite(weight).all()
    np.testing.assert_allclose(weight, [[1, 1]], rtol=1e-6)  # with a diagonal moment nothing else is needed
    hopeless = moments._replace(second_moment_II=torch.tensor([1e6, -1e6 + 1, 0, 0]).diag())
    with pytest.raises(ValueError, match=r"^the second moment is not positive definite, whatever the damping$"):
        fit_kept(torch.ones(1, 4), None, hopeless, torch.tensor([0, 1]))


# --- one unit after another ---------------------------------------------------------------------------------------


def cost_slowly(case: Case, metric: Array, gone: list[int], *, biased: bool) -> float:
    """tr(dW^T F dW (A + d I)) / 2 of the dense layer and its least-squares fit to the channels that stay."""
    kept = torch.tensor([i for i in range(CHANNELS) if i not in gone])
    fitted, _, _ = solve(case, kept, biased=biased)
    change = -case.weight.double().numpy()
    change[:, kept] += fitted
    x = case.x.double().numpy()
    spread = x - x.mean(0) if biased else x
    moment = spread.T @ spread / TOKENS
    moment += DAMPING * np.diag(moment).mean() * np.eye(CHANNELS)
    return float(np.trace(change.T @ metric @ change @ moment)) / 2


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("units", [24, 6])
def test_each_time_the_unit_goes_that_costs_least_when_the_rest_is_fitted(units: int, biased: bool) -> None:
    case, width = make_case(), CHANNELS // units
    root = np.random.default_rng(0).standard_normal((ROWS, ROWS))
    metric = root @ root.T
    removed = units - 2
    found = eliminate_units(
        case.weight, sum_up(case.x), torch.from_numpy(metric), units, removed, biased=biased, together=1
    )
    gone: list[int] = []
    for cost in found.cost_R.tolist():
        channels = {u: [c for g in [*gone, u] for c in range(g * width, g * width + width)] for u in range(units)}
        slow = {u: cost_slowly(case, metric, channels[u], biased=biased) for u in range(units) if u not in gone}
        gone.append(min(slow, key=slow.__getitem__))
        assert cost == pytest.approx(slow[gone[-1]], rel=1e-4)
    assert found.order_R.tolist() == gone


def test_units_that_go_together_cost_what_they_cost_together() -> None:
    case, metric = make_case(), np.eye(ROWS)
    found = eliminate_units(case.weight, sum_up(case.x), torch.eye(ROWS), CHANNELS, 10, biased=False, together=4)
    order = found.order_R.tolist()
    assert len(set(order)) == 10
    for end in (4, 8, 10):
        assert float(found.cost_R[end - 1]) == pytest.approx(
            cost_slowly(case, metric, order[:end], biased=False), rel=1e-4
        )
    steps = found.cost_R.diff(prepend=found.cost_R.new_zeros(1))
    torch.testing.assert_close(steps[:4], steps[0].expand(4))


def test_what_never_saw_an_input_costs_nothing() -> None:
    case = make_case()
    silent = eliminate_units(case.weight, sum_up(0 * case.x), torch.eye(ROWS), CHANNELS, 3, biased=False)
    assert silent.order_R.tolist() == [0, 1, 2] and silent.cost_R.tolist() == [0, 0, 0]


# --- by halves ----------------------------------------------------------------------------------------------------


def test_moments_of_two_halves_are_those_of_all_tokens() -> None:
    case = make_case()
    batches = [slice(0, 100), slice(100, 150), slice(150, None)]
    whole, halved = MomentSums(CHANNELS, case.x.device), HalvedSums(CHANNELS, case.x.device)
    for part in batches:
        whole.add(case.x[part], case.extra[part])
        halved.add(case.x[part], case.extra[part])
    assert halved.tokens == TOKENS
    expected, found = whole.finish(), halved.finish()
    for one, other in zip(found[:5], expected[:5], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert found.halves is not None
    for own, parts in zip(found.halves, ([batches[0], batches[2]], [batches[1]]), strict=True):
        x = torch.cat([case.x[part] for part in parts])
        torch.testing.assert_close(own.second_moment_II, x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    alone = HalvedSums(CHANNELS, case.x.device)
    alone.add(case.x)
    assert alone.finish().halves is None


def test_the_fewer_the_tokens_the_more_a_fit_is_damped() -> None:
    case = make_case()
    assert choose_damping(case.weight, sum_up(case.x), KEPT, biased=False) == DAMPING
    shares = []
    for tokens in (30, 300):
        sums = HalvedSums(CHANNELS, case.x.device)
        sums.add(case.x[: tokens // 2])
        sums.add(case.x[tokens // 2 : tokens])
        shares.append(choose_damping(case.weight, sums.finish(), KEPT, biased=False))
    assert shares[0] > shares[1] and {2 * share for share in shares} <= {*DAMPINGS}
