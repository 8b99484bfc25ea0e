"""What others published, as their own code has it: the references of our kernels' speed.

Shape suffixes: O output features (rows), I input features (columns), B columns of a block, R rows, N columns.
"""

import torch
from torch import Tensor

from billhook_kernels.damping import DAMPING


def remove_by_sort(score_RN: Tensor, sparsity: float) -> Tensor:
    """The mask (bool, True = goes) of the int(`sparsity` * N) lowest scores of each row, as Wanda's code makes it.

    arXiv 2306.11695, its authors' repository: a stable sort, and the first places scattered into a mask.
    """
    order_RN = torch.sort(score_RN, dim=-1, stable=True).indices
    goes_RN = torch.zeros_like(score_RN, dtype=torch.bool)
    return goes_RN.scatter_(1, order_RN[:, : int(sparsity * score_RN.shape[1])], True)


def prune_as_published(weight_OI: Tensor, second_moment_II: Tensor, sparsity: float, block: int = 128) -> Tensor:
    """SparseGPT as its paper has it (arXiv 2301.00774, algorithm 1), in the dtype of the weight.

    One column after another in blocks of `block`; the mask of a block by a sort of W^2 / U_jj^2, when the loop comes
    to it; the columns to the right of the block by one product at its end. U is the upper Cholesky factor of the
    inverse, from three calls (cholesky, cholesky_inverse, cholesky), damping and dead columns as in the authors' code.
    Every block loses int(`sparsity` * its size) weights, more only where scores tie.
    """
    work_OI, hessian_II = weight_OI.float().clone(), second_moment_II.float().clone()
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1
    work_OI[:, dead_I] = 0
    diagonal_I += DAMPING * diagonal_I.mean()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    columns = work_OI.shape[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        work_OB, upper_BB = work_OI[:, start:end], upper_II[start:end, start:end]
        score_OB = work_OB.square() / upper_BB.diagonal().square()
        threshold = score_OB.flatten().sort().values[int(sparsity * score_OB.numel())]
        goes_OB = score_OB < threshold
        error_OB = torch.zeros_like(work_OB)
        for j in range(end - start):
            error_OB[:, j] = work_OB[:, j] / upper_BB[j, j] * goes_OB[:, j]
            work_OB[:, j:] -= torch.outer(error_OB[:, j], upper_BB[j, j:])
        work_OB[goes_OB] = 0
        work_OI[:, end:] -= error_OB @ upper_II[start:end, end:]
    return work_OI.to(weight_OI.dtype)
