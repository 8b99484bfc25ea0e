"""Symmetric matrices as their upper triangles, bit for bit."""

import pytest
import torch

from billhook_kernels.statistics import BAND, count_triangle, pack_triangle, unpack_triangle


@pytest.mark.parametrize("width", [0, 1, BAND - 1, BAND, BAND + 1, 3 * BAND + 5])
def test_a_triangle_is_the_matrix_again_bit_for_bit(width: int) -> None:
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(width))
    upper = torch.triu(x.T @ x)
    matrix = upper + torch.triu(upper, 1).T
    triangle = pack_triangle(matrix)
    assert triangle.shape == (count_triangle(width),)
    assert unpack_triangle(triangle, width).equal(matrix)


def test_it_keeps_little_more_than_half() -> None:
    assert count_triangle(8960) / 8960**2 == pytest.approx(0.5 + BAND / 2 / 8960, abs=1e-4)
    assert count_triangle(BAND) == BAND**2 and count_triangle(2 * BAND) == 3 * BAND**2


def test_of_what_is_not_symmetric_the_upper_part_stays() -> None:
    matrix = torch.arange(100.0 * 100).reshape(100, 100)
    again = unpack_triangle(pack_triangle(matrix), 100)
    assert again[:BAND, BAND:].equal(matrix[:BAND, BAND:]) and again[BAND:, :BAND].equal(matrix[:BAND, BAND:].T)


def test_another_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a vector of \(5,\) is no triangle of a matrix of 2 rows$"):
        unpack_triangle(torch.zeros(5), 2)
