"""A Cholesky factorisation by halves, on any number of threads."""

from collections.abc import Iterator

import pytest
import torch

from billhook_kernels.obs import BASE, factor_lower


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_positive(n: int) -> torch.Tensor:
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(n))
    return x.T @ x / n


@pytest.mark.parametrize("n", [1, 5, BASE, BASE + 1, 2 * BASE + 3, 5 * BASE])
def test_it_is_the_lower_factor(n: int) -> None:
    matrix = make_positive(n)
    lower, positive = factor_lower(matrix)
    assert positive
    exact = torch.linalg.cholesky(matrix.double())
    torch.testing.assert_close(lower.double(), exact, rtol=1e-4, atol=1e-5)
    assert not bool(lower.triu(1).any())


@pytest.mark.parametrize("place", [0, BASE, 3 * BASE])
def test_what_is_not_positive_definite_is_said(place: int) -> None:
    matrix = make_positive(3 * BASE + 1)
    matrix[place, place] = -1.0
    assert not factor_lower(matrix)[1]


def test_the_same_bits_on_any_number_of_threads(threads: None) -> None:
    matrix, factors = make_positive(700), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        factors.append(factor_lower(matrix)[0])
    assert torch.equal(factors[0], factors[1]) and torch.equal(factors[0], factors[2])
