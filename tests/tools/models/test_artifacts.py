"""A pruned layer comes back from its artifact bit for bit, also from one of an earlier version."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from billhook_kernels.packed import BITS, PADDING, pack_rows
from tools.models.artifacts import HEADER, bound_artifact, hash_as_earlier, pack_pruned, unpack_pruned
from tools.workbench.store import ArtifactStore

NAN_WITH_PAYLOAD = {torch.float32: 0x7FC0BEEF, torch.bfloat16: 0x7FA5, torch.float16: 0x7E5A}
CPU = torch.device("cpu")
WEIGHT_OI = torch.tensor([[1.5, 0, -2], [0, 0, 3]])


def pack_earlier(weight_OI: Tensor, *, values: bool) -> dict[str, Tensor]:
    """What artifacts held before: mask bits without gaps between the rows, values without anything behind them."""
    keep_OI = weight_OI != 0
    mask = {"mask": torch.from_numpy(np.packbits(keep_OI.numpy().reshape(-1), bitorder="little"))}
    return mask | ({"values": weight_OI[keep_OI]} if values else {})


@given(st.sampled_from(sorted(BITS, key=str)), st.data())
def test_any_bits_come_back(dtype: torch.dtype, data: st.DataObject) -> None:
    width = torch.iinfo(BITS[dtype])
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    patterns = st.integers(width.min, width.max) | st.just(0) | st.just(width.min)  # the last is -0.0
    raw = data.draw(st.lists(patterns, min_size=rows * columns, max_size=rows * columns))
    weight_OI = torch.tensor(raw, dtype=BITS[dtype]).view(dtype).reshape(rows, columns)
    dense_OI = torch.ones(rows, columns, dtype=dtype)
    again_OI = unpack_pruned(pack_pruned(weight_OI, values=True), dense_OI, CPU)
    assert again_OI.dtype == dtype and torch.equal(again_OI.view(BITS[dtype]), weight_OI.view(BITS[dtype]))
    dense_OI = torch.where(weight_OI.view(BITS[dtype]) == 0, 1, weight_OI)  # survivors are the dense weights
    again_OI = unpack_pruned(pack_pruned(weight_OI, values=False), dense_OI, CPU)
    assert torch.equal(again_OI.view(BITS[dtype]), weight_OI.view(BITS[dtype]))
    plain_OI = torch.where(weight_OI == 0, 0, weight_OI)  # earlier a negative zero counted as zero
    again_OI = unpack_pruned(pack_earlier(weight_OI, values=True), dense_OI, CPU)
    assert again_OI.dtype == dtype and torch.equal(again_OI.view(BITS[dtype]), plain_OI.view(BITS[dtype]))


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (64, 96)])
def test_the_bound_is_the_file_of_a_layer_without_zeros(
    dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path
) -> None:
    store, weight_OI = ArtifactStore(tmp_path), torch.ones(shape, dtype=dtype)
    file = store.path(store.write_tensors(pack_pruned(weight_OI, values=True)), ".safetensors")
    assert 0 <= bound_artifact(weight_OI) - file.stat().st_size < HEADER


@pytest.mark.parametrize("dtype", BITS)
def test_payload_of_a_nan_survives(dtype: torch.dtype) -> None:
    raw = torch.tensor([[0, NAN_WITH_PAYLOAD[dtype], 1]], dtype=BITS[dtype])
    tensors = pack_pruned(raw.view(dtype), values=True)
    assert tensors["values"].numel() == 2 + PADDING
    assert torch.equal(unpack_pruned(tensors, torch.zeros(1, 3, dtype=dtype), CPU).view(BITS[dtype]), raw)


def test_all_and_nothing() -> None:
    for weight_OI in (torch.zeros(3, 5), torch.ones(3, 5)):
        for values in (False, True):
            assert torch.equal(unpack_pruned(pack_pruned(weight_OI, values=values), torch.ones(3, 5), CPU), weight_OI)
    assert unpack_pruned({}, WEIGHT_OI, CPU) is WEIGHT_OI


def test_an_artifact_is_a_layer_of_the_packed_format() -> None:
    packed = pack_rows(WEIGHT_OI)
    tensors = pack_pruned(WEIGHT_OI, values=True)
    assert list(tensors) == ["mask", "values"]
    assert torch.equal(tensors["mask"], packed.mask_OW) and torch.equal(tensors["values"], packed.values)
    assert list(pack_pruned(WEIGHT_OI, values=False)) == ["mask"]


def test_a_transposed_view_is_packed_as_it_reads() -> None:
    weight_OI = torch.arange(6.0).reshape(2, 3).T
    tensors = pack_pruned(weight_OI, values=True)
    assert tensors["values"].tolist() == [3, 1, 4, 2, 5] + [0] * PADDING
    assert torch.equal(unpack_pruned(tensors, torch.ones(3, 2), CPU), weight_OI)


EARLIER = {
    True: (
        "8a54ec56164ab4323ec0f68422f4669a1a4d095dd6f37b47a4522efc26e66191",
        b'x\0\0\0\0\0\0\0{"values":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
        b'"mask":{"dtype":"U8","shape":[1],"data_offsets":[12,13]}}   '
        b"\x00\x00\xc0\x3f\x00\x00\x00\xc0\x00\x00\x40\x40\x25",
    ),
    False: (
        "0b19a825e4c24417f631a52e06f28f61585f02dbd620de1795e58e329a12f215",
        b'8\0\0\0\0\0\0\0{"mask":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\x25',
    ),
}
"""Name and content of artifacts of WEIGHT_OI, with values and without, as Billhook wrote them before."""


@pytest.mark.parametrize("values", [False, True])
def test_an_artifact_of_an_earlier_version_is_read(values: bool, tmp_path: Path) -> None:
    digest, content = EARLIER[values]
    store = ArtifactStore(tmp_path)
    path = store.path(digest, ".safetensors")
    path.parent.mkdir()
    path.write_bytes(content)
    dense_OI = torch.full((2, 3), 7.0) if values else torch.where(WEIGHT_OI == 0, 7, WEIGHT_OI)
    again_OI = unpack_pruned(store.read_tensors(digest), dense_OI, CPU)
    assert torch.equal(again_OI, WEIGHT_OI) and not again_OI.signbit()[WEIGHT_OI == 0].any()
    assert hash_as_earlier(pack_pruned(WEIGHT_OI, values=values), dense_OI) == digest


def test_padding_bits_of_an_earlier_mask_are_ignored() -> None:
    mask = torch.tensor([0xFF], dtype=torch.uint8)
    assert unpack_pruned({"mask": mask}, torch.full((1, 3), 2.0), CPU).tolist() == [[2.0] * 3]


def test_what_does_not_fit_is_refused() -> None:
    earlier, tensors = pack_earlier(torch.tensor([[1.0, 0, 2]]), values=True), pack_pruned(WEIGHT_OI, values=True)
    mask, values = earlier["mask"], earlier["values"]
    for wrong, shape, problem in (
        ({"mask": mask}, (3, 3), "1 mask bytes for 9 weights"),
        ({"mask": torch.zeros(2, dtype=torch.uint8)}, (1, 3), "2 mask bytes for 3 weights"),
        ({"mask": mask, "values": values[:1]}, (1, 3), "33 values for 2 set bits and 32 of padding"),
        ({"mask": mask, "values": torch.cat([values, values[:1]])}, (1, 3), "35 values for 2 set bits"),
        (tensors, (3, 3), "the mask is"),
        ({"mask": tensors["mask"]}, (2, 33), "the mask is"),
        ({"mask": tensors["mask"]}, (2, 2), "the mask has bits behind its last column"),
        (tensors | {"values": tensors["values"][1:]}, (2, 3), "34 values for 3 set bits"),
    ):
        with pytest.raises(ValueError, match=problem):
            unpack_pruned(wrong, torch.zeros(shape), CPU)
