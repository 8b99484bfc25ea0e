"""ALPS against its paper's loop in float64: masks by sorting, inverses anew, every row on its own."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from billhook_kernels.alps import prepare_spectrum, solve_alps
from billhook_kernels.guard import DAMPING
from billhook_kernels.obs import prune_obs
from tests.kernels.layers import Layer, make_layer, true_errors
from tests.kernels.plain import Array, Flags, plain_groups, solve_rows


def plain_keep(values: Array, exact: Flags, zeros: int, pattern: tuple[int, int] | None) -> Flags:
    """The mask of the largest values; exact zeros go first, with a pattern no more of a group than N."""
    size, keep = np.abs(values), np.ones(values.shape, dtype=bool)
    may_go = keep.copy()
    if pattern is not None:
        pairs = zip(size.tolist(), exact.tolist(), strict=True)
        may_go = ~np.array([plain_groups(row, dead, *pattern) for row, dead in pairs])
    order = sorted((p for p in np.ndindex(*keep.shape) if may_go[p]), key=lambda p: (not exact[p], size[p], p))
    for place in order[: max(zeros, int((exact & may_go).sum()))]:
        keep[place] = False
    return keep


def plain_alps(layer: Layer, zeros: int, pattern: tuple[int, int] | None = None) -> tuple[Array, Flags, list[float]]:
    """Algorithms 1 and 2, and the penalties that they went through."""
    dense, h = layer.weight.double().numpy(), layer.moment.double().numpy().copy()
    exact = dense == 0
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    scale = np.sqrt(np.diag(h))
    c, dense = h / np.outer(scale, scale), dense * scale

    def restart() -> tuple[Array, Array]:
        return np.where(plain_keep(dense, exact, zeros, pattern), dense, 0), np.zeros_like(dense)

    d, v = restart()
    before, rho, penalties, moving = d != 0, 0.1, [0.1], False
    k = int(plain_keep(dense, exact, zeros, pattern).sum())
    for turn in range(1, 301):
        b = (dense @ c - v + rho * d) @ np.linalg.inv(c + rho * np.eye(len(c)))
        keep = plain_keep(b + v / rho, exact, zeros, pattern)
        d = np.where(keep, b + v / rho, 0)
        v = v + rho * (b - d)
        if turn % 3:
            continue
        changed, before = int((keep != before).sum()), keep
        if changed > 0.1 * k:
            moving, factor = True, 1.3
        elif changed > 0.005 * k:
            moving, factor = True, 1.2
        elif moving:
            if not changed:
                break
            factor = 1.1
        else:
            factor = 1 / 5
            if changed:
                d, v = restart()
        if turn > 30 and changed < 0.0003 * k:
            break
        rho *= factor
        penalties.append(rho)
    keep = plain_keep(b, exact, zeros, pattern)
    return plain_conjugate_gradients(dense, np.where(keep, b, 0), keep, c) / scale, keep, penalties


def plain_conjugate_gradients(dense: Array, start: Array, keep: Flags, c: Array) -> Array:
    """Ten iterations on each row's survivors; C's diagonal is 1, and so is the preconditioner."""
    fitted = start.copy()
    for row, w0, kept in zip(fitted, dense, keep, strict=True):
        part = c[np.ix_(kept, kept)]
        residual = (c @ (w0 - row))[kept]
        step, moved = residual.copy(), np.zeros_like(residual)
        for _ in range(10):
            if residual @ residual <= 1e-28 * (w0 @ w0):
                break
            length = residual @ residual / (step @ part @ step)
            moved += length * step
            rest = residual - length * (part @ step)
            step = rest + rest @ rest / (residual @ residual) * step
            residual = rest
        row[kept] += moved
    return fitted


def make_sparse_layer(columns: int) -> Layer:
    """Exact zeros, a row of nothing else, a whole group of them, and columns that saw no input."""
    layer = make_layer(6, columns, seed=1)
    layer.weight[1], layer.weight[:, 4:8], layer.weight[2, ::2] = 0, 0, 0
    layer.moment[[3, 13]], layer.moment[:, [3, 13]] = 0, 0
    return layer


def assert_solved(pruned: Tensor, keep: Tensor, expected: Array, kept: Flags) -> None:
    assert np.array_equal(keep.numpy(), kept)
    np.testing.assert_allclose(pruned.double().numpy(), expected, atol=1e-5 * np.abs(expected).max())


LAYERS = [make_layer(6, 24), make_layer(1, 40), make_layer(9, 36, seed=2), make_sparse_layer(24)]


@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 4)])
@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "one row", "tall", "sparse already"])
def test_alps_is_the_papers_loop(layer: Layer, pattern: tuple[int, int] | None) -> None:
    weights = layer.weight.numel()
    for zeros in [weights * 45 // 100, weights * 7 // 10] if pattern is None else [weights // 4 * pattern[0]]:
        expected, kept, _ = plain_alps(layer, zeros, pattern)
        result = solve_alps(layer.weight, layer.moment, zeros, pattern=pattern)
        assert int((~result.keep_OI).sum()) == zeros
        assert_solved(result.weight_OI, result.keep_OI, expected, kept)


def make_settled_layer(borderline: int) -> Layer:
    """A mask that hardly moves: large weights and small ones, and a few between them."""
    layer = make_layer(20, 64)
    weight = layer.weight.sign() * (10 + layer.weight.abs())
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(3))
    weight.view(-1)[places[: 600 - borderline]] *= 0.001
    weight.view(-1)[places[600 - borderline : 600 + borderline]] *= torch.linspace(0.3, 0.5, 2 * borderline)
    return layer._replace(weight=weight, moment=torch.eye(64) + 0.02)


@pytest.mark.parametrize(
    ("layer", "factors"),
    [
        (make_layer(20, 64), {1.2, 1.3}),
        (make_settled_layer(1), {0.2}),
        (make_settled_layer(2), {0.2, 1.1, 1.2}),
    ],
)
def test_the_penalty_follows_how_many_survivors_change_places(layer: Layer, factors: set[float]) -> None:
    expected, kept, penalties = plain_alps(layer, 600)
    assert {round(after / before, 6) for before, after in pairwise(penalties)} == factors
    result = solve_alps(layer.weight, layer.moment, 600)
    assert_solved(result.weight_OI, result.keep_OI, expected, kept)


def test_alps_ends_near_the_optimum_of_a_better_mask() -> None:
    layer = make_layer(48, 96)
    zeros = layer.weight.numel() * 6 // 10
    alps = solve_alps(layer.weight, layer.moment, zeros)
    published = prune_obs(layer.weight, layer.moment, zeros)
    errors = [true_errors(x.weight_OI.double().numpy(), layer).sum() for x in (alps, published)]
    assert errors[0] < errors[1]
    best = true_errors(solve_rows(layer.weight, alps.keep_OI.numpy(), layer.moment), layer).sum()
    assert errors[0] < 1.01 * best


def test_the_result_does_not_depend_on_units() -> None:
    layer = make_layer(6, 24)
    result = solve_alps(layer.weight, layer.moment, 80)
    for scale in (2.0**-40, 2.0**40):
        assert torch.equal(solve_alps(layer.weight, layer.moment * scale, 80).weight_OI, result.weight_OI)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_without_any_input_it_is_the_largest_weights(pattern: tuple[int, int] | None) -> None:
    weight = make_layer(4, 8).weight
    result = solve_alps(weight, torch.zeros(8, 8), 16, pattern=pattern)
    kept = plain_keep(weight.double().numpy(), weight.numpy() == 0, 16, pattern)
    assert np.array_equal(result.keep_OI.numpy(), kept)
    assert torch.equal(result.weight_OI, weight * result.keep_OI)


def test_what_is_not_finite_is_refused() -> None:
    moment = torch.eye(4)
    moment[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^the second moment is not finite$"):
        solve_alps(torch.ones(2, 4), moment, 4)


def test_a_spectrum_that_is_at_hand_is_used() -> None:
    layer = make_layer(6, 24)
    spectrum = prepare_spectrum(layer.moment)
    assert spectrum is not None and float(spectrum.matrix_II.diagonal().sub(1).abs().max()) == 0
    inverse = torch.linalg.inv(spectrum.matrix_II.double() + 0.3 * torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(spectrum.invert(0.3).double(), inverse, rtol=1e-4, atol=1e-5)
    result = solve_alps(layer.weight, layer.moment, 80, spectrum=spectrum)
    assert torch.equal(result.weight_OI, solve_alps(layer.weight, layer.moment, 80).weight_OI)
    assert prepare_spectrum(torch.zeros(3, 3)) is None


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    layer = make_layer(160, 288)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(solve_alps(layer.weight, layer.moment, 27_000).weight_OI)
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
