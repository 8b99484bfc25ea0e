"""Native packed products: right, and never a byte beside their buffers."""

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from billhook_kernels import threads
from billhook_kernels.native import MOST_ROWS, WORD, compile_kernels, explain_absence, multiply_rows, unpack_rows
from billhook_kernels.packed import PADDING, pack_rows
from tests.kernels.layers import make_sparse

DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(bool(explain_absence(dtype)), reason=explain_absence(dtype)))
    for dtype in (torch.bfloat16, torch.float32)
]
SHAPES = [(1, 1), (1, 31), (1, 32), (2, 33), (3, 63), (4, 64), (5, 65), (7, 129), (17, 96), (33, 257)]
SIDES = ("left", "right")

Guard = Callable[[Tensor, str], Tensor]


@pytest.fixture
def guard() -> Iterator[Guard]:
    """Copies a tensor to where its first byte (left) or last one (right) touches a page that nobody may touch."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    kept: list[tuple[mmap.mmap, int, int]] = []

    def protect(address: int, size: int, flags: int) -> None:
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), flags) == 0, ctypes.get_errno()

    def copy(tensor: Tensor, side: str) -> Tensor:
        inside = -(-max(1, tensor.nbytes) // page) * page
        area = mmap.mmap(-1, inside + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        offset = page if side == "left" else page + inside - tensor.nbytes
        guarded = torch.frombuffer(area, dtype=torch.uint8, count=inside, offset=page)
        guarded = guarded[offset - page : offset - page + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        guarded.copy_(tensor)
        protect(address, page, 0)
        protect(address + page + inside, page, 0)
        kept.append((area, address, inside + 2 * page))
        return guarded

    yield copy
    for _, address, size in kept:
        protect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)


def make_inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_close(y_BO: Tensor, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
    """Within a few roundings of fp32, and then one to the dtype, of the exact sum."""
    exact_BO = x_BI.double() @ weight_OI.double().T + (0 if bias_O is None else bias_O.double())
    bound_BO = x_BI.double().abs() @ weight_OI.double().abs().T
    assert y_BO.dtype == x_BI.dtype
    rounding = torch.finfo(y_BO.dtype).eps / 2
    assert bool(((y_BO.double() - exact_BO).abs() <= rounding * exact_BO.abs() + 1e-6 * bound_BO).all())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_buffers_is_touched(guard: Guard, dtype: torch.dtype, side: str) -> None:
    kernels = compile_kernels(dtype)
    for shape in SHAPES:
        for sparsity in (0.0, 0.5, 1.0):
            weight_OI = make_sparse(*shape, dtype, sparsity)
            mask_OW, values, offsets_O, _ = pack_rows(weight_OI)
            (rows, words), wide = mask_OW.shape, mask_OW.shape[1] * WORD
            # Without the padding of the format: the kernel reads no value that no bit asks for.
            places = guard(mask_OW, side), guard(values[:-PADDING], side), guard(offsets_O, side)
            pointers = [place.data_ptr() for place in places]
            for count in range(1, MOST_ROWS + 1):
                x_BI = make_inputs(count, shape[1], dtype)
                x = guard(torch.nn.functional.pad(x_BI, (0, wide - shape[1])), side)
                y_BO = guard(torch.full((count, rows), torch.nan, dtype=dtype), side)
                bias_O = guard(torch.full((rows,), 0.5, dtype=dtype), side)
                sizes = (0, rows, words, rows)
                kernels.multiply[count](*pointers, bias_O.data_ptr(), x.data_ptr(), y_BO.data_ptr(), *sizes)
                assert_close(y_BO, x_BI, weight_OI, bias_O)
                kernels.multiply[count](*pointers, 0, x.data_ptr(), y_BO.data_ptr(), *sizes)
                assert_close(y_BO, x_BI, weight_OI)
            wide_OI = guard(torch.full((rows, wide), torch.nan, dtype=dtype), side)
            kernels.unpack(*pointers, wide_OI.data_ptr(), 0, rows, words)
            assert torch.equal(wide_OI[:, : shape[1]], weight_OI) and not wide_OI[:, shape[1] :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_shape(dtype: torch.dtype) -> None:
    for rows in (1, 2, 3):
        for columns in range(1, 3 * WORD + 2):
            weight_OI = make_sparse(rows, columns, dtype, 0.4, seed=columns)
            packed = pack_rows(weight_OI)
            x_BI = make_inputs(2, columns, dtype)
            assert_close(multiply_rows(*packed[:3], x_BI), x_BI, weight_OI)
            assert torch.equal(unpack_rows(*packed[:3])[:, :columns], weight_OI)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_one_pass_serves(dtype: torch.dtype) -> None:
    weight_OI = make_sparse(70, 100, dtype, 0.5)
    for count in (MOST_ROWS, MOST_ROWS + 1, 3 * MOST_ROWS - 1):
        x_BI = make_inputs(count, 100, dtype)
        assert_close(multiply_rows(*pack_rows(weight_OI)[:3], x_BI), x_BI, weight_OI)
        assert_close(multiply_rows(*pack_rows(weight_OI)[:3], x_BI.T.contiguous().T), x_BI, weight_OI)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "THREAD_BYTES", 1)
    for rows in (1, 5, 8, 67):
        weight_OI = make_sparse(rows, 200, dtype, 0.5)
        packed, x_BI = pack_rows(weight_OI), make_inputs(3, 200, dtype)
        answers = []
        for count in range(1, 9):
            torch.set_num_threads(count)
            answers.append((multiply_rows(*packed[:3], x_BI), unpack_rows(*packed[:3])))
        torch.set_num_threads(1)
        assert_close(answers[0][0], x_BI, weight_OI)
        assert all(torch.equal(y, answers[0][0]) and torch.equal(w, answers[0][1]) for y, w in answers)


def test_small_weights_are_no_work_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for size, expected in (
        (0, [(0, 8)]),
        (2 * threads.THREAD_BYTES - 1, [(0, 8)]),
        (2 * threads.THREAD_BYTES, [(0, 4), (4, 8)]),
        (9 * threads.THREAD_BYTES, [(0, 2), (2, 4), (4, 6), (6, 8)]),
    ):
        shares: list[tuple[int, int]] = []
        threads.share_rows(lambda first, last: shares.append((first, last)), 8, size)  # noqa: B023
        assert sorted(shares) == expected


def test_what_is_not_finite_is_multiplied_as_in_a_dense_product() -> None:
    if explain_absence(torch.bfloat16):
        pytest.skip(explain_absence(torch.bfloat16))
    weight_OI = torch.tensor([[torch.inf, 0.0], [0.0, 1.0], [torch.nan, 1.0], [-0.0, 2.0]], dtype=torch.bfloat16)
    x_BI = torch.tensor([[1.0, 2.0], [0.0, 1.0], [torch.inf, 1.0]], dtype=torch.bfloat16)
    dense_BO = (x_BI.float() @ weight_OI.float().T).bfloat16()
    torch.testing.assert_close(multiply_rows(*pack_rows(weight_OI)[:3], x_BI), dense_BO, equal_nan=True, rtol=0, atol=0)


def test_results_are_rounded_as_torch_rounds() -> None:
    """Every rounding there is: W is 1 and x is a sum of two, so that the result in fp32 is exactly known."""
    if explain_absence(torch.bfloat16):
        pytest.skip(explain_absence(torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(-(2**15), 2**15, (4000,), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    low = high * 2.0 ** -torch.randint(8, 20, (4000,), generator=generator).float()
    x_BI = torch.stack([high, low.bfloat16()], 1)
    y_BO = multiply_rows(*pack_rows(torch.ones(1, 2, dtype=torch.bfloat16))[:3], x_BI)
    expected = (x_BI[:, 0].float() + x_BI[:, 1].float()).bfloat16()
    torch.testing.assert_close(y_BO[:, 0], expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    llvm = pytest.importorskip("llvmlite.binding")
    explain = explain_absence.__wrapped__
    assert explain(torch.float16) == "there is no native kernel for float16"
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: {"avx512f": True, "avx512bw": True})
    assert explain(torch.bfloat16) == "this processor lacks avx512vbmi2"
    assert explain(torch.float32) == ""
    monkeypatch.setattr(llvm, "get_host_cpu_features", dict)
    assert explain(torch.float32) == "this processor lacks avx512f, avx512bw"
    monkeypatch.setitem(__import__("sys").modules, "llvmlite.binding", None)
    assert explain(torch.bfloat16) == "llvmlite is not installed (pip install 'billhook[fast]')"
