"""Refit all surviving weights of a layer at once. Shape suffixes: O output features, I input features."""

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of mean(diag A) added to A's diagonal, as in SparseGPT (arXiv 2301.00774)."""


def refit_survivors(
    dense_OI: Tensor,
    keep_OI: Tensor,
    second_moment_II: Tensor,
    *,
    start_OI: Tensor | None = None,
    iterations: int = 16,
    tolerance: float = 1e-3,
) -> Tensor:
    """Least squares over the survivors of each row against the dense row: fp32, zero where `keep_OI` is False.

    Minimises (w - w0)^T H (w - w0) over the entries of w that stay, H = A + DAMPING * mean(diag A) * I, by
    conjugate gradients with a Jacobi preconditioner, all rows together; starts at the masked dense weights, so no
    iteration leaves a larger error than the mask alone, or at the masked `start_OI`, where a better start is known:
    then none is larger than the start's. Stops when the preconditioned residual has fallen to
    `tolerance` of where it began.
    """
    dense_OI = dense_OI.float()
    diagonal_I = second_moment_II.diagonal()
    damping = DAMPING * float(diagonal_I.mean())
    if damping <= 0:  # the layer never saw a non-zero input: nothing to fit to
        return dense_OI * keep_OI
    inverse_diagonal_I = 1 / (diagonal_I + damping)

    def product(rows_OI: Tensor) -> Tensor:
        return torch.addmm(rows_OI, rows_OI, second_moment_II, beta=damping)

    weight_OI = (dense_OI if start_OI is None else start_OI.float()) * keep_OI
    residual_OI = product(dense_OI - weight_OI).mul_(keep_OI)
    step_OI = residual_OI * inverse_diagonal_I
    norm_O = (residual_OI * step_OI).sum(1, keepdim=True)
    first = float(norm_O.sum())
    for _ in range(iterations):
        product_OI = product(step_OI).mul_(keep_OI)
        # A row that is already exact has norm and curvature zero, and must stay where it is.
        alpha_O = norm_O / (step_OI * product_OI).sum(1, keepdim=True).clamp(min=1e-30)
        weight_OI.addcmul_(alpha_O, step_OI)
        residual_OI.addcmul_(alpha_O, product_OI, value=-1)
        scaled_OI = residual_OI * inverse_diagonal_I
        new_norm_O = (residual_OI * scaled_OI).sum(1, keepdim=True)
        if float(new_norm_O.sum()) <= tolerance**2 * first:
            break
        step_OI.mul_(new_norm_O / norm_O.clamp(min=1e-30)).add_(scaled_OI)
        norm_O = new_norm_O
    return weight_OI
