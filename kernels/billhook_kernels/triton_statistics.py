"""Sums over tokens on a GPU, in fp32 whatever the inputs are, without what they are sums of being written out.

Shape suffixes: T tokens, I input features (d_in), O output features (d_out), K tiles of output features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
"""Rows and columns of the result that one program makes."""

STEP = 32
"""Terms of its sums that it reads at once."""

HALF = (torch.bfloat16, torch.float16)
"""Whose values, widened to fp32, TF32 has exactly: their products on tensor cores are those of fp32."""


def add_second_moment(total_II: Tensor, x_TI: Tensor) -> None:
    """Add sum_t x_t x_t^T to `total_II` (fp32, in place): the half below the diagonal is computed, both are written."""
    tokens, columns = x_TI.shape
    if tokens == 0:
        return
    x_TI = x_TI.contiguous()
    tiles = triton.cdiv(columns, TILE)
    with torch.cuda.device_of(x_TI):
        _add_second_moment[(tiles, tiles)](
            x_TI,
            total_II,
            tokens,
            columns,
            *total_II.stride(),
            PRECISION=_choose_precision(x_TI.dtype),
            TILE=TILE,
            STEP=STEP,
            num_warps=8,
            num_stages=2,
            enable_fp_fusion=True,
        )


def sum_changes(x_TI: Tensor, part_OI: Tensor, g_TO: Tensor) -> Tensor:
    """g_t^T dW x_t of every token: shape (T,), fp32. On tensor cores, and as exact, where x and dW have 16 bits."""
    (tokens, inputs), outputs = x_TI.shape, len(part_OI)
    dtype = x_TI.dtype if part_OI.dtype in HALF else torch.float32
    tiles = triton.cdiv(outputs, TILE)
    change_KT = torch.empty(tiles, tokens, dtype=torch.float32, device=x_TI.device)
    if tokens:
        with torch.cuda.device_of(x_TI):
            _change_of_tokens[(triton.cdiv(tokens, TILE), tiles)](
                x_TI.contiguous(),
                part_OI.contiguous(),
                g_TO.contiguous(),
                change_KT,
                tokens,
                inputs,
                outputs,
                PRECISION=_choose_precision(dtype),
                TILE=TILE,
                STEP=STEP,
                num_warps=8,
                num_stages=2,
                enable_fp_fusion=True,
            )
    return change_KT.sum(0)


def _choose_precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype in HALF and torch.version.hip is None else "ieee"


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _add_second_moment(
    x,
    total,
    tokens,
    columns,
    row_stride,
    column_stride,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    if tl.program_id(1) <= tl.program_id(0):
        i = tl.program_id(0) * TILE + tl.arange(0, TILE)
        j = tl.program_id(1) * TILE + tl.arange(0, TILE)
        sums = tl.zeros((TILE, TILE), tl.float32)
        for first in range(0, tokens, STEP):
            t = first + tl.arange(0, STEP)
            row = t.to(tl.int64)[:, None] * columns
            there = (t < tokens)[:, None]
            # Widened first: a dot of bf16 is wrong under Triton's interpreter.
            left = tl.load(x + row + i[None, :], mask=there & (i < columns)[None, :], other=0.0).to(tl.float32)
            right = tl.load(x + row + j[None, :], mask=there & (j < columns)[None, :], other=0.0).to(tl.float32)
            sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
        inside = (i < columns)[:, None] & (j < columns)[None, :]
        wide_i, wide_j = i.to(tl.int64)[:, None], j.to(tl.int64)[None, :]
        below = total + wide_i * row_stride + wide_j * column_stride
        # On the diagonal too: what lies above is what lies below, however a product rounds.
        lower, mirrored = inside & (wide_i >= wide_j), inside & (wide_i > wide_j)
        tl.store(below, tl.load(below, mask=lower, other=0.0) + sums, mask=lower)
        above = total + wide_j * row_stride + wide_i * column_stride
        tl.store(above, tl.load(above, mask=mirrored, other=0.0) + sums, mask=mirrored)


@triton.jit
def _change_of_tokens(
    x, part, g, change, tokens, inputs, outputs, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr
):
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o = tl.program_id(1) * TILE + tl.arange(0, TILE)
    wide_t, wide_o = t.to(tl.int64), o.to(tl.int64)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, inputs, STEP):
        i = first + tl.arange(0, STEP)
        x_inside = (t < tokens)[:, None] & (i < inputs)[None, :]
        left = tl.load(x + wide_t[:, None] * inputs + i[None, :], mask=x_inside, other=0.0).to(tl.float32)
        part_inside = (i < inputs)[:, None] & (o < outputs)[None, :]
        right = tl.load(part + wide_o[None, :] * inputs + i[:, None], mask=part_inside, other=0.0).to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    inside = (t < tokens)[:, None] & (o < outputs)[None, :]
    gradient = tl.load(g + wide_t[:, None] * outputs + o[None, :], mask=inside, other=0.0).to(tl.float32)
    to = change + tl.program_id(1).to(tl.int64) * tokens + t
    tl.store(to, tl.sum(tl.where(inside, sums * gradient, 0.0), 1), mask=t < tokens)
