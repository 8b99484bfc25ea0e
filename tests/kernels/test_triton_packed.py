"""Packed weights of Triton's kernels are those of torch, bit for bit, and products right in fp32."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from billhook_kernels.packed import (
    BITS,
    PADDING,
    PackedLinear,
    PackedWeight,
    multiply_packed,
    pack_bits,
    pack_mask,
    pack_rows,
    unpack_mask,
    unpack_rows,
)
from tests.kernels.layers import DTYPES, make_sparse

triton_packed = pytest.importorskip("billhook_kernels.triton_packed", reason="triton is not installed")
MOST_ROWS = triton_packed.MOST_ROWS
Ask = Callable[[str], None]


def make_bits(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A weight of any bits: NaNs with payloads, infinities, zeros of both signs."""
    width = torch.iinfo(BITS[dtype])
    generator = torch.Generator().manual_seed(columns)
    bits = torch.randint(width.min, width.max, (rows, columns), generator=generator).to(BITS[dtype])
    bits[torch.rand(rows, columns, generator=generator) < 0.4] = 0
    bits[0, -1] = width.min  # -0.0
    return bits.view(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


SHAPES = [(1, 1), (2, 31), (3, 64), (2, 65)]


# With more than a block of columns one dtype of each width has to do: Triton's interpreter takes seconds.
@pytest.mark.parametrize(
    ("shape", "dtype"), [*product(SHAPES, DTYPES), *product([(2, 2100)], [torch.bfloat16, torch.float32])]
)
def test_weights_are_packed_as_by_torch(
    shape: tuple[int, int], dtype: torch.dtype, ask_for_kernels: Ask, device: torch.device
) -> None:
    weight_OI = make_bits(*shape, dtype)
    mask = weight_OI == 0
    if mask.numel() < 1000:  # as it lies in memory a mask may be turned; thousands of rows take the interpreter long
        mask = mask.T
    ask_for_kernels("torch")
    expected = [*pack_rows(weight_OI)[:3], pack_mask(mask), pack_bits(mask)]
    ask_for_kernels("triton")
    packed = pack_rows(weight_OI.to(device))
    found = [*packed[:3], pack_mask(mask.to(device)), pack_bits(mask.to(device))]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert packed.columns == shape[1] and found[4].device.type == "cpu"
    assert same(unpack_rows(packed), weight_OI)
    assert same(unpack_mask(found[3], mask.shape[1]), mask)


def make_product(
    rows: int, columns: int, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[PackedWeight, Tensor, Tensor, Tensor]:
    """(weight packed, x, bias, weight)."""
    generator = torch.Generator().manual_seed(columns)
    weight_OI = make_sparse(rows, columns, dtype, seed=columns + 1)
    x_BI, bias_O = torch.randn(count, columns, generator=generator), torch.randn(rows, generator=generator)
    return pack_rows(weight_OI.to(device)), x_BI.to(device, dtype), bias_O.to(device, dtype), weight_OI.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "count"), [(1, 1), (33, 3), (70, 8), (70, 9), (1025, 2), (2100, 1)])
def test_products_are_those_of_the_dense_weight(
    columns: int, count: int, dtype: torch.dtype, ask_for_kernels: Ask, device: torch.device
) -> None:
    ask_for_kernels("triton")
    packed, x_BI, bias_O, weight_OI = make_product(3, columns, count, dtype, device)
    exact_BO, bound_BO = x_BI.double() @ weight_OI.double().T, x_BI.double().abs() @ weight_OI.double().abs().T
    for y_BO, right_BO in (
        (multiply_packed(packed, x_BI), exact_BO),
        (PackedLinear(packed, bias_O)(x_BI.T.contiguous().T[None])[0], exact_BO + bias_O.double()),
    ):
        assert y_BO.dtype == dtype and y_BO.shape == (count, 3)
        # A few roundings of fp32, and then one to the dtype; what is unpacked first is multiplied by torch.
        room_BO = torch.finfo(dtype).eps / 2 * right_BO.abs() + 1e-6 * (bound_BO + 1)
        if count > MOST_ROWS:
            room_BO = 2 * torch.finfo(dtype).eps * (bound_BO + 1)
        assert bool(((y_BO.double() - right_BO).abs() <= room_BO).all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_results_are_rounded_as_torch_rounds(ask_for_kernels: Ask, device: torch.device) -> None:
    """W is 1 and x is a sum of two, so that the result in fp32 is exactly known; NaN and infinity are among them."""
    ask_for_kernels("triton")
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(-(2**15), 2**15, (200,), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    high[high.abs() < 1e-30] = 1.0  # the interpreter widens subnormal bf16 wrongly
    high[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    low = (high.float() * 2.0 ** -torch.randint(8, 12, (200,), generator=generator).float()).bfloat16()
    packed = pack_rows(torch.ones(1, 2, dtype=torch.bfloat16, device=device))
    y_BO = triton_packed.multiply_rows(*packed[:3], torch.stack([high, low], 1).to(device))
    expected_B = (high.float() + low.float()).bfloat16()
    torch.testing.assert_close(y_BO[:, 0].cpu(), expected_B, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_is_multiplied_as_in_a_dense_product(ask_for_kernels: Ask, device: torch.device) -> None:
    ask_for_kernels("triton")
    weight_OI = torch.tensor([[torch.inf, 0.0], [0.0, 1.0], [torch.nan, 1.0], [-0.0, 2.0]], dtype=torch.bfloat16)
    x_BI = torch.tensor([[1.0, 2.0], [0.0, 1.0], [torch.inf, 1.0]], dtype=torch.bfloat16)
    y_BO = multiply_packed(pack_rows(weight_OI.to(device)), x_BI.to(device))
    expected_BO = (x_BI.float() @ weight_OI.float().T).bfloat16()
    torch.testing.assert_close(y_BO.cpu(), expected_BO, equal_nan=True, rtol=0, atol=0)


def test_nothing_behind_the_last_value_is_read(ask_for_kernels: Ask, device: torch.device) -> None:
    """Without the padding of the format, in a buffer that ends in NaNs."""
    ask_for_kernels("triton")
    packed, x_BI, _, weight_OI = make_product(2, 70, 2, torch.float32, device)
    values = packed.values.clone()
    values[-PADDING:] = torch.nan
    bare = packed._replace(values=values[:-PADDING])
    assert torch.equal(multiply_packed(bare, x_BI), multiply_packed(packed, x_BI))
    assert torch.equal(unpack_rows(bare), weight_OI)
