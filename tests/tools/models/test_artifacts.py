"""A pruned layer comes back from its artifact bit for bit."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from billhook_kernels.packed import BITS, PADDING, pack_rows
from tools.models.artifacts import HEADER, bound_artifact, pack_pruned, unpack_pruned
from tools.workbench.store import ArtifactStore

NAN_WITH_PAYLOAD = {torch.float32: 0x7FC0BEEF, torch.bfloat16: 0x7FA5, torch.float16: 0x7E5A}
CPU = torch.device("cpu")
WEIGHT_OI = torch.tensor([[1.5, 0, -2], [0, 0, 3]])


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


def test_what_does_not_fit_is_refused() -> None:
    tensors = pack_pruned(WEIGHT_OI, values=True)
    for wrong, shape, problem in (
        (tensors, (3, 3), "the mask is"),
        ({"mask": tensors["mask"]}, (2, 33), "the mask is"),
        ({"mask": tensors["mask"]}, (2, 2), "the mask has bits behind its last column"),
        (tensors | {"values": tensors["values"][1:]}, (2, 3), "34 values for 3 set bits"),
    ):
        with pytest.raises(ValueError, match=problem):
            unpack_pruned(wrong, torch.zeros(shape), CPU)
