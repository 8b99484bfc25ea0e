"""Packed weights made on a GPU, in the format of `kernels/FORMAT.md`.

Values are moved as integers of their width, so that every bit of them stays. The functions check nothing:
`billhook_kernels.packed` makes and checks what they read.

Shape suffixes: O output features (rows), I input features (columns), W = ceil(I / 32) words of a mask row,
N values, K chunks of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 32
"""Bits of a word of the mask."""

CHUNK = 2048
"""Columns of a row that one program packs."""

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
