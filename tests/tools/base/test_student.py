"""Student's t, beside the values of the tables."""

import math

import pytest

from tools.base.student import find_p, find_quantile

TABLE = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 9: 2.262157, 10: 2.228139, 30: 2.042272}
"""Degrees of freedom to the quantile of 97.5 %, as printed in every table."""


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert find_quantile(degrees) == pytest.approx(quantile, abs=1e-6)
    assert find_p(quantile, degrees) == find_p(-quantile, degrees) == pytest.approx(0.05, abs=1e-7)


def test_two_standard_errors_of_three_seeds_are_no_proof() -> None:
    assert find_p(2.0, 2) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-12)
    assert find_p(1.0, 1) == pytest.approx(0.5, abs=1e-12)
    assert (find_p(0.0, 4), find_p(math.inf, 4)) == (1.0, 0.0)
    assert find_quantile(4, 0.99) == pytest.approx(4.604095, abs=1e-6)
