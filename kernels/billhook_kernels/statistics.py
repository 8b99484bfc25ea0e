"""Statistics of a layer's inputs and output gradients, and the KL a removal is predicted to cost.

Shape suffixes: T tokens, I input features (d_in), O output features (d_out).
All results are fp32, whatever the dtype of the inputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from billhook_kernels.dispatch import choose_kernel
from billhook_kernels.masks import kth_smallest_each, order_preserving_ints

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


def add_second_moment(total_II: Tensor, x_TI: Tensor) -> None:
    """Add sum_t x_t x_t^T of this batch to `total_II` (fp32, in place); products and sums are those of fp32."""
    if choose_kernel(x_TI.device) == "triton":
        from billhook_kernels import triton_statistics

        return triton_statistics.add_second_moment(total_II, x_TI)
    wide_TI = x_TI.float()
    with multiply_bf16(wide_TI.device, x_TI.dtype == torch.bfloat16):
        total_II.addmm_(wide_TI.T, wide_TI)


def sum_squares(x_TF: Tensor) -> Tensor:
    """Sum over tokens of the squares of each feature: shape (F,), fp32."""
    return x_TF.float().square().sum(0)


def lean_to_mean(square_O: Tensor, tokens: int, prior: int) -> Tensor:
    """(n gamma_i + p mean(gamma)) / (n + p): the mean squares (O,) of n `tokens`, and the layer's own mean for p more.

    An output that few of the tokens moved looks as if it never mattered; the fewer they are, the less that is believed
    (a posterior mean under a prior worth p tokens; gamma is compared within the layer, whose mean stays as it is).
    """
    return (tokens * square_O + prior * square_O.mean()) / (tokens + prior)


def lean_anew(leant_O: Tensor, tokens: int, counted: float, prior: int) -> Tensor:
    """What `lean_to_mean` made of mean squares by so many `tokens`, (O,), as it makes it by as many as `counted`."""
    mean = leant_O.mean()
    return mean + (tokens + prior) / tokens * counted / (counted + prior) * (leant_O - mean)


def mean_absolute_gradient(g_TO: Tensor, x_TI: Tensor) -> float:
    """Mean over the weights of |dL/dW| for one sample, where dL/dW = sum_t g_t x_t^T (arXiv 2601.09694)."""
    with multiply_bf16(x_TI.device, g_TO.dtype == x_TI.dtype == torch.bfloat16):
        gradient_OI = (g_TO.float().T @ x_TI.float()).abs_()
    # Row by row, then in numpy: a sum over all at once would depend on how many threads share it.
    return float(gradient_OI.sum(1).double().cpu().numpy().sum()) / gradient_OI.numel()


def level_of_each_weight(score_OI: Tensor, dead_OI: Tensor, zeros: list[int]) -> Tensor:
    """Index of the first level at which each weight is pruned: uint8, `len(zeros)` where it never is.

    `zeros` are the ascending numbers of weights pruned at each level, lowest scores first and
    the weights marked `dead_OI` (exact zeros) before all others. Ties at a threshold all go to the lower level.
    """
    ranks_N = order_preserving_ints(score_OI, dead_OI).flatten()
    thresholds = kth_smallest_each(ranks_N, [min(count, ranks_N.numel()) for count in zeros])
    if ranks_N.device.type != "cpu":
        return torch.bucketize(ranks_N, thresholds).to(torch.uint8).reshape(score_OI.shape)
    level_N, above_N = np.zeros(ranks_N.numel(), np.uint8), np.empty(ranks_N.numel(), np.bool_)
    for threshold in thresholds.tolist():  # seven times as fast as torch.bucketize on one thread
        level_N += np.greater(ranks_N.numpy(), threshold, out=above_N).view(np.uint8)
    return torch.from_numpy(level_N).reshape(score_OI.shape)


def nested_parts(weight_OI: Tensor, level_OI: Tensor, levels: int) -> Iterator[Tensor]:
    """What each level removes beyond the level before, from `level_of_each_weight`: as the weight, zero elsewhere."""
    nothing = weight_OI.new_zeros(())
    for level in range(levels):
        yield torch.where(level_OI == level, weight_OI, nothing)


def squared_loss_changes(pairs: Sequence[tuple[Tensor, Tensor]], parts: Iterable[Tensor]) -> Tensor:
    """sum_t (g_t^T dW(s) x_t)^2 for every level s and window: shape (levels, windows), fp64.

    `pairs` are the inputs x (T, I) and output gradients g (T, O) of a layer on several windows; `parts` what each level
    changes beyond the level before (O, I), so that dW(s) is the sum of the parts up to s and costs one product each.
    Divided by 2T this is the second-order estimate of KL(dense || pruned) when g are gradients of
    -log p(y) for labels y drawn from the model itself (the empirical Fisher of the model's own distribution).
    """
    if choose_kernel(pairs[0][0].device) == "triton":
        return _sum_changes(pairs, parts)
    dtypes = {x_TI.dtype for x_TI, _ in pairs}
    changes = [torch.zeros(len(x_TI), device=x_TI.device) for x_TI, _ in pairs]
    totals = []
    for part_OI in parts:
        bf16 = dtypes == {torch.bfloat16} and narrow(part_OI, torch.bfloat16).dtype == torch.bfloat16
        part_OI = part_OI.float()
        with multiply_bf16(part_OI.device, bf16):
            for change_T, (x_TI, g_TO) in zip(changes, pairs, strict=True):
                change_T += (x_TI.float() @ part_OI.T).mul_(g_TO).sum(1)  # of one window at a time is fp32 held
        del part_OI  # it would be held while the next one is made
        totals.append(torch.stack([change_T.double().square().sum() for change_T in changes]))
    return torch.stack(totals)


def _sum_changes(pairs: Sequence[tuple[Tensor, Tensor]], parts: Iterable[Tensor]) -> Tensor:
    """The same on a GPU, where no product (T, O) is written out and nothing widened to fp32."""
    from billhook_kernels.triton_statistics import HALF, sum_changes

    dtype = pairs[0][0].dtype
    changes = [torch.zeros(len(x_TI), device=x_TI.device) for x_TI, _ in pairs]
    totals = []
    for part_OI in parts:
        narrow_OI = narrow(part_OI, dtype) if dtype in HALF else part_OI
        for change_T, (x_TI, g_TO) in zip(changes, pairs, strict=True):
            change_T += sum_changes(x_TI, narrow_OI, g_TO)
        del part_OI, narrow_OI  # as above
        totals.append(torch.stack([change_T.double().square().sum() for change_T in changes]))
    return torch.stack(totals)


def narrow(part_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """`part_OI` in a dtype of 16 bits where that loses nothing, as in a model of that dtype, else itself, fp32."""
    if part_OI.dtype == dtype:
        return part_OI
    narrow_OI = part_OI.to(dtype)
    return narrow_OI if torch.equal(narrow_OI.float(), part_OI) else part_OI


@contextmanager
def multiply_bf16(device: torch.device, exact: bool) -> Iterator[None]:
    """While it lasts a CPU may multiply fp32 tensors with its instructions for bf16, sums in fp32.

    Where all values are `exact` in bf16 that rounds nothing, and is 2.4 to 2.6 times as fast with AMX. (torch.mm of
    bf16 tensors rounds its result to bf16, and knows no other on a CPU.)
    """
    if device.type != "cpu" or not exact:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def clip_tokens(g_TO: Tensor, multiple: float) -> Tensor:
    """The gradients with each token's sum of squares brought down to at most `multiple` times the median token's."""
    wide_TO = g_TO.float()
    size_T = wide_TO.square().sum(1)
    limit = multiple * size_T.median()
    return wide_TO * (limit / size_T.clamp(min=1e-38)).sqrt().clamp(max=1.0)[:, None]
