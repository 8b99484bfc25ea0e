"""What OWL and AlphaPruning measure, against slow references in float64."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.statistics.table import (
    compute_z_scores,
    fit_tail,
    measure_alpha,
    measure_outliers,
    measure_peak,
    measure_wanda,
)

Array = NDArray[np.float64]


def make_block(seed: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of different sizes and scales, and mean squares with a few loud inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights, mean_squares = [], []
    for rows, columns, scale in ((16, 24, 1.0), (8, 24, 0.2), (40, 12, 3.0)):
        weights.append((torch.randn(rows, columns, generator=generator) * scale).to(dtype))
        square = torch.rand(columns, generator=generator)
        square[::7] *= 200
        mean_squares.append(square)
    return weights, mean_squares


def slow_outliers(weights: list[Tensor], mean_squares: list[Tensor]) -> float:
    scores = [
        (w.double().abs() * a.double().sqrt()).flatten().numpy() for w, a in zip(weights, mean_squares, strict=True)
    ]
    together = np.concatenate(scores)
    return 100 * int((together > 5 * together.mean()).sum()) / len(together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_outliers_are_those_of_the_concatenated_scores(seed: int, dtype: torch.dtype) -> None:
    weights, mean_squares = make_block(seed, dtype)
    measured = measure_outliers(weights, mean_squares)
    assert measured == slow_outliers(weights, mean_squares)
    assert 0 < measured < 10


def test_outliers_by_hand() -> None:
    quiet, loud = torch.ones(9, 10), torch.ones(1, 10)
    quiet[0, 0], loud[0, :2] = 0, -7  # the mean of all 100 is 1.11
    assert measure_outliers([quiet, loud], [torch.ones(10), torch.ones(10)]) == 2
    assert measure_outliers([quiet, loud], [torch.ones(10), torch.full((10,), 0.01)]) == 0
    assert measure_outliers([torch.zeros(3, 3)], [torch.ones(3)]) == 0


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("form", [(1, 1), (3, 7), (40, 25), (500, 401)])
def test_the_score_of_a_layer_is_the_tenth_part_of_the_active_weights(form: tuple[int, int], zeros: float) -> None:
    generator = torch.Generator().manual_seed(form[0])
    weight_OI, mean_square_I = torch.randn(form, generator=generator), torch.rand(form[1], generator=generator)
    weight_OI[torch.rand(form, generator=generator) < zeros] = 0
    active = sorted((weight_OI.abs() * mean_square_I.sqrt())[weight_OI != 0].tolist())
    assert measure_wanda(weight_OI, mean_square_I) == (active[math.ceil(len(active) / 10) - 1] if active else 0)


def slow_alpha(weight: Tensor) -> float:
    """The published `alpha_peak`, eigenvalue by eigenvalue."""
    spectrum = sorted(float(s) ** 2 for s in np.linalg.svd(weight.double().numpy(), compute_uv=False))
    logs = [math.log10(value) for value in spectrum]
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for value in logs:
        counts[min(int((value - logs[0]) / width), 99)] += 1
    peak = 10 ** (logs[0] + width * counts.index(max(counts)))
    best = (2.0, 0.0)
    for start, least in enumerate(spectrum[:-1]):
        if math.log10(0.95 * peak) <= least <= 1.5 * peak:
            tail = spectrum[start:]
            n = len(tail)
            alpha = 1 + n / sum(math.log(value / least) for value in tail)
            distance = max(abs(1 - (value / least) ** (1 - alpha) - i / n) for i, value in enumerate(tail))
            best = min(best, (distance, alpha))
    return best[1]


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (20, 48), (48, 20), (90, 64)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 20.0])  # the lower end of the search depends on it
def test_alpha_is_the_published_one(rows: int, columns: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    loud = torch.exp(torch.randn(columns, generator=generator))
    weight = torch.randn(rows, columns, generator=generator) * loud * scale
    assert measure_alpha(weight) == pytest.approx(slow_alpha(weight), rel=1e-6)
    assert measure_alpha(weight.T) == pytest.approx(measure_alpha(weight), rel=1e-6)
    assert measure_alpha(weight.bfloat16()) == pytest.approx(slow_alpha(weight.bfloat16().double()), rel=1e-6)


def test_a_peak_is_the_share_of_the_strongest_input() -> None:
    assert measure_peak(torch.tensor([1.0, 6.0, 1.0])) == 0.75
    assert measure_peak(torch.full((8,), 2.0)) == 0.125
    assert measure_peak(torch.zeros(4)) == 0


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_alpha_of_a_power_law(alpha: float) -> None:
    quantiles = (np.arange(2000) + 0.5) / 2000
    assert fit_tail((1 - quantiles) ** (-1 / (alpha - 1))) == pytest.approx(alpha, rel=0.03)
    weight = torch.diag(torch.from_numpy((1 - quantiles[::10]) ** (-0.5 / (alpha - 1))))
    assert measure_alpha(weight) == pytest.approx(alpha, rel=0.15)


def test_rows_and_columns_of_zeros_do_not_count() -> None:
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(weight, (0, 5, 0, 20))
    assert measure_alpha(padded) == pytest.approx(measure_alpha(weight), rel=1e-9)


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.ones(1, 6), torch.ones(6, 1), torch.ones(4, 6)])
def test_a_weight_without_a_spectrum_has_no_alpha(weight: Tensor) -> None:
    assert measure_alpha(weight) is None


def test_equal_eigenvalues_have_a_finite_alpha() -> None:
    alpha = measure_alpha(torch.eye(8) * 3)
    assert alpha is not None and math.isfinite(alpha)


def test_z_scores() -> None:
    assert compute_z_scores([1.0, 3.0]) == pytest.approx([-1, 1])
    assert compute_z_scores([2.0, 2.0, 2.0]) == [0, 0, 0]
    assert compute_z_scores([7.0]) == [0]
