"""A file that is written a tensor at a time is one that the library reads, whatever order they come in."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tools.models.unfinished import Form, write_tensors

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "a.values": torch.arange(7, dtype=torch.float32).to(torch.bfloat16),
    "b.mask": torch.arange(6, dtype=torch.int32).view(2, 3),
    "scale": torch.tensor(-0.0),
    "none": torch.empty(0, 4, dtype=torch.float16),
    "turned": torch.arange(6.0).view(2, 3).T,
    "step": torch.tensor(2**40),
}
FORMS = {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_every_bit_comes_back_and_metadata_that_comes_last(tmp_path: Path) -> None:
    told = iter(("0000", "abcd"))
    write_tensors(tmp_path / "x", FORMS, reversed(TENSORS.items()), lambda: {"hash": next(told)})
    read = load_file(tmp_path / "x")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor) and torch.equal(read[name].signbit(), tensor.signbit()), name
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"hash": "abcd"}


def test_what_is_not_as_was_said_is_refused(tmp_path: Path) -> None:
    def write(tensors: Iterator[tuple[str, torch.Tensor]], metadata: Iterator[Mapping[str, str]]) -> None:
        write_tensors(tmp_path / "x", FORMS, tensors, lambda: next(metadata))

    same = [{"a": "b"}, {"a": "b"}]
    with pytest.raises(ValueError, match=r"^other is torch.float32 \(\), which nobody had said of it$"):
        write(iter([("other", torch.tensor(0.0))]), iter(same))
    with pytest.raises(ValueError, match=r"^flags is torch.float32 \(3,\), which nobody had said of it$"):
        write(iter([("flags", torch.zeros(3))]), iter(same))
    with pytest.raises(ValueError, match=r"^scale, none, turned, step came out otherwise than was said$"):
        write(iter(list(TENSORS.items())[:3]), iter(same))
    with pytest.raises(ValueError, match=r"^the metadata came out otherwise than was said$"):
        write(iter(TENSORS.items()), iter([{"a": "b"}, {"a": "b" * 9}]))
