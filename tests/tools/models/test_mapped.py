"""The dense weights lie on disk and are mapped: the same bits, and no second model in memory."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.base.errors import DiskFull, UserError
from tools.models import mapped
from tools.models.mapped import map_tensors

STATUS, MAPS = Path("/proc/self/status"), Path("/proc/self/maps")


def test_copies_have_the_same_bits_and_the_file_no_name(tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, 2).to(torch.bfloat16).T,
        "c": torch.randn(1, 3, dtype=torch.float16),
        "d": torch.tensor([[float("nan"), -0.0]]),
    }
    copies = map_tensors(weights.items(), tmp_path / "artifacts")
    assert list(copies) == list(weights) and list((tmp_path / "artifacts").iterdir()) == []
    for name, copy in copies.items():
        weight = weights[name]
        assert (copy.dtype, copy.shape, copy.is_contiguous()) == (weight.dtype, weight.shape, True)
        assert torch.equal(copy.view(torch.uint8), weight.contiguous().view(torch.uint8))
        assert copy.data_ptr() % 64 == copies["a"].data_ptr() % 64
    before = copies["b"].clone()
    weights["b"].zero_()
    copies["a"].zero_()
    assert torch.equal(copies["b"], before), "neither the model nor another copy shares them"
    assert dict(map_tensors([], tmp_path)) == {}


@pytest.mark.skipif(not STATUS.is_file(), reason="this system has no /proc")
def test_they_take_no_memory_that_another_could_not_have(tmp_path: Path) -> None:
    def held() -> int:
        (found,) = re.findall(r"^RssAnon:\s+(\d+) kB", STATUS.read_text(), flags=re.MULTILINE)
        return int(found) * 1024

    weight = torch.ones(2048, 4096)
    before = held()
    (copy,) = map_tensors([("a", weight)], tmp_path).values()
    assert float(copy.sum()) == weight.numel()
    assert held() - before < weight.nbytes / 4


@pytest.mark.skipif(not MAPS.is_file(), reason="this system has no /proc")
def test_they_may_be_longer_than_the_memory(tmp_path: Path) -> None:
    """A private copy, which Linux refuses where it is, is not asked for; what is written to them stays when they go."""
    mapped = map_tensors([("a", torch.ones(3))], tmp_path)
    (rights,) = re.findall(rf"^\S+ (\S+) .* {re.escape(str(tmp_path))}/#\d+ ", MAPS.read_text(), flags=re.MULTILINE)
    assert rights == "rw-s"
    mapped["a"][1] = 5
    mapped.let_go(["a"])
    assert mapped["a"].tolist() == [1, 5, 1]


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (
            errno.ENOSPC,
            DiskFull,
            r"the disk is full \(\d+ MB free\) while writing PATH; free some space, then go on: .*",
        ),
        (errno.EACCES, UserError, "the dense weights in PATH cannot be written: Permission denied"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_line(
    number: int, kind: type[UserError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mapped.tempfile, "TemporaryFile", refuse)
    with pytest.raises(kind, match=f"^{said.replace('PATH', re.escape(str(tmp_path)))}$"):
        map_tensors([("a", torch.ones(1))], tmp_path)
