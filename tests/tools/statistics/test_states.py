"""Block inputs on disk: what is put there comes back as it was, the last first."""

import errno
from pathlib import Path

import pytest
import torch

import tools.statistics.shards
from tools.base.errors import DiskFull
from tools.statistics.shards import StateStack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_come_back_last_first(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(1, 3 + i, 5, generator=generator).to(dtype) for i in range(n)] for n in (2, 0, 3)]
    lists[0][0][0, 0, :2] = torch.tensor([-0.0, torch.nan], dtype=dtype)
    stack = StateStack(tmp_path)
    for states in lists:
        stack.push(states)
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    for states in reversed(lists):
        taken = stack.pop()
        assert [x.shape for x in taken] == [x.shape for x in states]
        for x, y in zip(taken, states, strict=True):
            assert x.dtype == dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_a_part_of_a_larger_tensor(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    stack = StateStack(tmp_path)
    stack.push([whole[:, 1:3]])
    assert torch.equal(stack.pop()[0], whole[:, 1:3])


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, *_: int) -> int:
            return 0

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(tools.statistics.shards.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(DiskFull):
        StateStack(tmp_path).push([torch.zeros(2)])
