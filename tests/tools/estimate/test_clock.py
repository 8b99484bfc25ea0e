"""The line through two runs."""

import pytest
import torch

from tools.estimate.clock import Fit, fit, time_call


@pytest.mark.parametrize(
    ("small", "large", "line"),
    [
        ((10, 3.0), (20, 5.0), Fit(1.0, 0.2)),
        ((10, 5.0), (20, 4.0), Fit(4.0, 0.0)),  # noise: the larger one counts
        ((10, 1.0), (20, 5.0), Fit(0.0, 0.25)),  # nothing takes less than no time
        ((20, 3.0), (20, 4.0), Fit(0.0, 0.2)),
        ((0, 0.0), (0, 0.0), Fit(0.0, 0.0)),
    ],
)
def test_a_line_through_two_runs(small: tuple[float, float], large: tuple[float, float], line: Fit) -> None:
    assert fit(small, large) == pytest.approx(line)


def test_a_larger_size_is_on_the_line() -> None:
    assert Fit(1.0, 0.2).at(100) == pytest.approx(21.0)


def test_what_is_timed_is_called_once() -> None:
    calls: list[int] = []
    assert time_call(torch.device("cpu"), lambda: calls.append(1)) >= 0
    assert calls == [1]
