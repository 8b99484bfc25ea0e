"""The upper triangle of a symmetric matrix as one vector, and back: little more than half of its entries.

Shape suffixes: N rows, and columns, of the matrix, U entries that are kept.
"""

import torch
from torch import Tensor

BAND = 64
"""Rows that are kept together, from their first row's diagonal on: a band is one copy, and a triangle few of them."""


def count_triangle(width: int) -> int:
    """Entries that are kept of a matrix of so many rows."""
    return sum((min(first + BAND, width) - first) * (width - first) for first in range(0, width, BAND))


def pack_triangle(matrix_NN: Tensor) -> Tensor:
    """Bands of `BAND` rows, each from the column of its first row on, row by row: (U,), of the same dtype.

    What lies below the diagonal bands is not read: of a matrix that is not symmetric to the bit, the upper part stays.
    """
    width = len(matrix_NN)
    bands = (matrix_NN[first : first + BAND, first:].reshape(-1) for first in range(0, width, BAND))
    return torch.cat(list(bands)) if width else matrix_NN.reshape(-1)


def unpack_triangle(triangle_U: Tensor, width: int) -> Tensor:
    """The symmetric matrix (N, N) of so many rows that `pack_triangle` made a vector of, where the vector is.

    Raises ValueError where it is none of such a matrix.
    """
    if triangle_U.shape != (count_triangle(width),):
        raise ValueError(f"a vector of {tuple(triangle_U.shape)} is no triangle of a matrix of {width} rows")
    matrix_NN, start = triangle_U.new_empty(width, width), 0
    for first in range(0, width, BAND):
        rows = min(first + BAND, width) - first
        band = triangle_U[start : start + rows * (width - first)].view(rows, width - first)
        matrix_NN[first:, first : first + rows] = band.T
        matrix_NN[first : first + rows, first:] = band
        start += band.numel()
    return matrix_NN
