"""Refit all surviving weights of a layer at once. Shape suffixes: O output features, I input features."""

import torch
from torch import Tensor

from billhook_kernels.preconditioner import Preconditioner, System, multiply, prepare_system


def refit_survivors(
    dense_OI: Tensor,
    keep_OI: Tensor,
    second_moment_II: Tensor,
    *,
    start_OI: Tensor | None = None,
    system: System | None = None,
    iterations: int = 16,
    tolerance: float = 0.03,
    coast: bool = False,
) -> Tensor:
    """Least squares over the survivors of each row against the dense row: fp32, zero where `keep_OI` is False.

    Minimises (w - w0)^T H (w - w0) over the entries of w that stay, H = A + DAMPING * mean(diag A) * I, by
    preconditioned conjugate gradients, all rows together: one product (d_out x d_in) (d_in x d_in) an iteration.
    Starts at the masked dense weights, so no iteration leaves a larger error than the mask alone; or at the masked
    `start_OI`, where a better start is known. Stops when the preconditioned residual has fallen to `tolerance` of
    where it began: what is left to gain is then about `tolerance` squared of what was.

    `system` is `prepare_system(second_moment_II)`, if it is at hand. With `coast` it ends with one more step in the
    next direction, as long as the last one instead of the best length: nearly as good, and it costs no product.
    """
    system = system or prepare_system(second_moment_II)
    stays_OI = keep_OI.float()
    start_OI = (dense_OI if start_OI is None else start_OI) * stays_OI
    if system is None:  # the layer never saw a non-zero input: nothing to fit to
        return start_OI
    precondition = Preconditioner(system.factor_IK, stays_OI)
    # Five buffers for all iterations: on CPU a fresh one costs more than what is computed into it.
    step_OI = (dense_OI - start_OI).mul_(system.scale_I)
    residual_OI, spare_OI, product_OI = (torch.empty_like(step_OI) for _ in range(3))
    multiply(step_OI, system, out=residual_OI, scratch=spare_OI).mul_(stays_OI)
    moved_OI = torch.zeros_like(residual_OI)
    norm_O = _dot_rows(residual_OI, precondition(residual_OI, out=step_OI), scratch=spare_OI)
    first, alpha_O = float(norm_O.sum()), torch.zeros_like(norm_O)
    for iteration in range(iterations):
        multiply(step_OI, system, out=product_OI, scratch=spare_OI)
        # A row that is already exact has norm and curvature zero, and must stay where it is.
        alpha_O = norm_O / _dot_rows(step_OI, product_OI, scratch=spare_OI).clamp(min=1e-30)
        moved_OI.addcmul_(alpha_O, step_OI)
        if iteration == iterations - 1 and not coast:
            break
        residual_OI.addcmul_(alpha_O, product_OI, value=-1).mul_(stays_OI)
        scaled_OI = precondition(residual_OI, out=spare_OI)
        new_norm_O = _dot_rows(residual_OI, scaled_OI, scratch=product_OI)
        if float(new_norm_O.sum()) <= tolerance**2 * first:
            coast = False
            break
        step_OI, spare_OI = scaled_OI.addcmul_(new_norm_O / norm_O.clamp(min=1e-30), step_OI), step_OI
        norm_O = new_norm_O
    if coast:
        moved_OI.addcmul_(alpha_O, step_OI)
    return start_OI.addcdiv_(moved_OI, system.scale_I)


def _dot_rows(left_OI: Tensor, right_OI: Tensor, *, scratch: Tensor) -> Tensor:
    return torch.mul(left_OI, right_OI, out=scratch).sum(1, keepdim=True)
