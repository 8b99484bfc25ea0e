"""A Cholesky factorisation that is the same bits on any number of threads, which LAPACK's is not.

Shape suffixes: N any.
"""

import torch
from torch import Tensor

from billhook_kernels.threads import one_thread

BASE = 128
"""Rows that LAPACK factors, on one thread; above, triangular solves and products do, which MKL keeps to the bit."""


def factor_lower(matrix_NN: Tensor) -> tuple[Tensor, bool]:
    """(L with L L^T = the matrix, whether it is positive definite); fp32, of the lower half. L is a new tensor.

    By halves on the CPU, as LAPACK's own recursive version (Gustavson 1997); in one call on a GPU.
    """
    if matrix_NN.device.type != "cpu" or len(matrix_NN) <= BASE:
        with one_thread(matrix_NN.device):
            lower_NN, failed = torch.linalg.cholesky_ex(matrix_NN)
        return lower_NN, int(failed) == 0
    half = len(matrix_NN) // 2
    lower_NN = torch.zeros_like(matrix_NN)
    first, positive = factor_lower(matrix_NN[:half, :half])
    if positive:
        below = torch.linalg.solve_triangular(first, matrix_NN[half:, :half].T, upper=False).T
        last, positive = factor_lower(matrix_NN[half:, half:] - below @ below.T)
        lower_NN[:half, :half], lower_NN[half:, :half], lower_NN[half:, half:] = first, below, last
    return lower_NN, positive
