"""Packed weights on a GPU: made, unpacked and multiplied, in the format of `kernels/FORMAT.md`.

Values are moved as integers of their width, so that every bit of them stays. The functions check nothing:
`billhook_kernels.packed` makes and checks what they read.

Shape suffixes: B rows of x, O output features (rows), I input features (columns), W = ceil(I / 32) words of a mask row,
N values, K chunks of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 32
"""Bits of a word of the mask."""

MOST_ROWS = 8
"""Rows of x that one pass over the weight serves."""

CHUNK = 2048
"""Columns of a row that one program packs."""

_BYTES = 128
"""Bytes of a mask row that a program multiplies or unpacks at once."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def pack_bits(keep_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Mask words (int32, O x W) of a bool mask, and the number of its bits in each chunk: (int32, O x K)."""
    rows, columns = keep_OI.shape
    words, chunks = triton.cdiv(columns, WORD), triton.cdiv(columns, CHUNK)
    mask_OW = torch.empty(rows, words, dtype=torch.int32, device=keep_OI.device)
    counts_OK = torch.empty(rows, chunks, dtype=torch.int32, device=keep_OI.device)
    keep_OI = keep_OI.contiguous().view(torch.uint8)
    with torch.cuda.device_of(keep_OI):
        _pack_chunk[(rows * chunks,)](
            keep_OI, mask_OW, counts_OK, columns, words, chunks, CHUNK=CHUNK, enable_fp_fusion=False
        )
    return mask_OW, counts_OK


def collect_kept(values_OI: Tensor, keep_OI: Tensor, counts_OK: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """What a mask keeps, row by row, behind it `padding` zeros; and where each row begins: int64, (O,).

    `counts_OK` are those of `pack_bits`.
    """
    columns = values_OI.shape[1]
    ends_OK = counts_OK.flatten().cumsum(0).view_as(counts_OK)
    starts_OK = ends_OK - counts_OK
    integers = INTEGERS[values_OI.itemsize]
    kept_N = torch.zeros(int(ends_OK[-1, -1]) + padding, dtype=integers, device=values_OI.device)
    bits_OI, keep_OI = values_OI.contiguous().view(integers), keep_OI.contiguous().view(torch.uint8)
    with torch.cuda.device_of(values_OI):
        _collect_chunk[(counts_OK.numel(),)](
            bits_OI, keep_OI, starts_OK, kept_N, columns, counts_OK.shape[1], CHUNK=CHUNK, enable_fp_fusion=False
        )
    return kept_N.view(values_OI.dtype), starts_OK[:, 0].contiguous()


def unpack_rows(mask_OW: Tensor, values: Tensor, offsets_O: Tensor, columns: int) -> Tensor:
    """A packed weight as (O, I)."""
    rows, words = mask_OW.shape
    integers = INTEGERS[values.itemsize]
    weight_OI = torch.empty(rows, columns, dtype=integers, device=values.device)
    with torch.cuda.device_of(values):
        _unpack_row[(rows,)](
            mask_OW,
            values.view(integers),
            offsets_O,
            weight_OI,
            columns,
            words,
            WORDS=_BYTES // 4,
            enable_fp_fusion=False,
        )
    return weight_OI.view(values.dtype)


def multiply_rows(
    mask_OW: Tensor, values: Tensor, offsets_O: Tensor, x: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """x W^T + b of a packed weight: x (…, I), b and the result (…, O) in the values' dtype, sums in fp32."""
    rows, words = mask_OW.shape
    *batch, columns = x.shape
    x_BI = x.reshape(-1, columns).contiguous()
    y_BO = x.new_empty(len(x_BI), rows)
    with torch.cuda.device_of(values):
        for start in range(0, len(x_BI), MOST_ROWS):
            part_BI, part_BO = x_BI[start : start + MOST_ROWS], y_BO[start : start + MOST_ROWS]
            count = len(part_BI)
            _multiply_row[(rows,)](
                mask_OW.view(torch.uint8),
                values,
                offsets_O,
                values if bias_O is None else bias_O,
                part_BI,
                part_BO.view(torch.int16) if x.dtype == torch.bfloat16 else part_BO,
                columns,
                4 * words,
                rows,
                count,
                BIASED=bias_O is not None,
                BF16=x.dtype == torch.bfloat16,
                ROWS=triton.next_power_of_2(count),
                BYTES=_BYTES,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return y_BO.view(*batch, rows)


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _pack_chunk(keep, mask, counts, columns, words, chunks, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    row, chunk = program // chunks, program % chunks
    word = chunk * (CHUNK // 32) + tl.arange(0, CHUNK // 32)
    bit = tl.arange(0, 32)
    column = word[:, None] * 32 + bit[None, :]
    kept = tl.load(keep + row.to(tl.int64) * columns + column, mask=column < columns, other=0).to(tl.int32)
    tl.store(mask + row.to(tl.int64) * words + word, tl.sum(kept << bit[None, :], 1), mask=word < words)
    tl.store(counts + program, tl.sum(tl.sum(kept, 1), 0))


@triton.jit
def _collect_chunk(bits, keep, starts, kept, columns, chunks, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    row, chunk = program // chunks, program % chunks
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    at = row.to(tl.int64) * columns + column
    stays = tl.load(keep + at, mask=column < columns, other=0).to(tl.int32)
    to = tl.load(starts + program) + tl.cumsum(stays, 0) - stays
    tl.store(kept + to, tl.load(bits + at, mask=stays == 1, other=0), mask=stays == 1)


@triton.jit
def _count_bits(word):
    """Set bits of unsigned 32-bit words."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit
def _unpack_row(mask, values, offsets, weight, columns, words, WORDS: tl.constexpr):
    """A value lies behind those of the words before its own, and of the lower bits of its word."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    bit = tl.arange(0, 32)
    lower = (1 << bit).to(tl.uint32, bitcast=True) - 1
    for first in range(0, words, WORDS):
        place = first + tl.arange(0, WORDS)
        word = tl.load(mask + row * words + place, mask=place < words, other=0).to(tl.uint32, bitcast=True)
        count = _count_bits(word)
        before = tl.cumsum(count, 0) - count
        at = start + before[:, None] + _count_bits(word[:, None] & lower[None, :])
        kept = ((word[:, None] >> bit[None, :].to(tl.uint32)) & 1) == 1
        column = place[:, None] * 32 + bit[None, :]
        value = tl.load(values + at, mask=kept, other=0)
        tl.store(weight + row * columns + column, value, mask=column < columns)
        start += tl.sum(count, 0)


@triton.jit
def _multiply_row(
    mask,
    values,
    offsets,
    bias,
    x,
    y,
    columns,
    width,
    outputs,
    count,
    BIASED: tl.constexpr,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One output of all rows of x. A thread has whole bytes of the mask: the values of a byte lie side by side.

    `width`: bytes of a row of the mask. Weights that are not kept are 0 and multiplied, so that an infinite x gives
    NaN as in a dense product. y is bf16 as int16: rounded here, as Triton's interpreter would cut it off.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    b = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BYTES), tl.float32)
    for first in range(0, width, BYTES):
        place = first + tl.arange(0, BYTES)
        byte = tl.load(mask + row * width + place, mask=place < width, other=0).to(tl.uint32)
        kept = _count_bits(byte)
        at = start + tl.cumsum(kept, 0) - kept
        for bit in tl.static_range(8):
            stays = ((byte >> bit) & 1).to(tl.int32)
            value = tl.load(values + at, mask=stays == 1, other=0.0).to(tl.float32)
            column = place * 8 + bit
            inside = (column < columns)[None, :] & (b < count)[:, None]
            part = tl.load(x + b[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
            total += value[None, :] * part
            at += stays
        start += tl.sum(kept, 0)
    result = tl.sum(total, 1)
    if BIASED:
        result += tl.load(bias + row).to(tl.float32)
    to = y + b * outputs + row
    if BF16:
        bits = result.to(tl.int32, bitcast=True)
        upper = (bits >> 16) & 0xFFFF
        rounded = ((bits + 0x7FFF + (upper & 1)) >> 16) & 0xFFFF
        tl.store(to, tl.where(result == result, rounded, upper | 64).to(tl.int16), mask=b < count)
    else:
        tl.store(to, result, mask=b < count)
