"""What there is: GPUs of this machine or another, its memory, and how a model is laid over several."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.estimate.helpers import LLAMA_70B, large_settings, write_config
from tests.tools.estimate.test_block import make_empty
from tools.base.errors import UserError
from tools.estimate import room as module
from tools.estimate.block import build_empty
from tools.estimate.room import Devices, Room, explain_absence, find_devices, find_room, lay_out, read_devices


@pytest.mark.parametrize(("text", "count", "size"), [("80", 1, 80e9), ("8x80", 8, 80e9), ("2x23.5", 2, 23.5e9)])
def test_devices_of_another_machine(text: str, count: int, size: float) -> None:
    assert read_devices(text) == Devices(count=count, bytes=int(size))


@pytest.mark.parametrize("text", ["", "0", "0x80", "8x", "x80", "80GB", "8X80", "-1", "8x80x2", "1e3", "8x0.0"])
def test_no_such_devices(text: str) -> None:
    with pytest.raises(UserError) as caught:
        read_devices(text)
    assert str(caught.value) == f"device memory {text!r} is neither GB, such as 80, nor COUNTxGB, such as 8x80"


def test_memory_of_this_machine_where_the_cpu_is_the_device(no_gpu: None) -> None:
    found = find_devices("cpu")
    assert found is not None and found.count == 1 and found.bytes > 1e9
    assert find_devices("cuda") is None or torch.cuda.device_count() > 0


def test_of_another_machine_only_what_is_told_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "count_memory", lambda: 7)
    devices, unknown = Devices(count=2, bytes=5), float("inf")
    assert find_room("cuda", devices, here=False) == Room(gpu=5, cpu=unknown)
    assert find_room("cuda", devices, here=True) == Room(gpu=5, cpu=7)
    assert find_room("cuda", None, here=True) == Room(gpu=unknown, cpu=7)
    assert find_room("cpu", devices, here=False).cpu == 5
    assert find_room("cpu", find_devices("cpu"), here=True).cpu == 7


def test_llama_70b_over_eight_gpus(tmp_path: Path) -> None:
    model: Any = build_empty(large_settings(write_config(tmp_path / "70b", LLAMA_70B)))[0]
    block = 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192)
    head = 2 * 128256 * 8192
    assert [(line.what, line.how, line.bytes) for line in lay_out(model, read_devices("8x80"))] == [
        ("GPU 0", "9 blocks, model.embed_tokens", 9 * block + head),
        *((f"GPU {i}", "11 blocks", 11 * block) for i in range(1, 7)),
        ("GPU 7", "5 blocks, model.norm, model.rotary_emb, lm_head", 5 * block + head + 2 * 8192),
    ]
    with pytest.raises(
        UserError, match=r"^the model's 141\.1 GB do not fit the GPUs, which have 80\.0 GB free in all: "
    ):
        lay_out(model, read_devices("80"))
    with pytest.raises(
        UserError, match=r"^torch sees no GPU here to spread the model over; plan for others with --dev"
    ):
        lay_out(model, None)


def test_what_cannot_be_run_here_is_not_timed(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_empty("llama")
    assert explain_absence(model, "cuda") == "torch sees no GPU here"
    assert explain_absence(model, "cpu") == ""
    block = 4 * (15_360 // 2 + 2 * 32)
    monkeypatch.setattr(module, "count_free", lambda: module.ROOM * block - 1)
    assert explain_absence(model, "cpu") == "one block of it does not fit the memory that is free here"
    monkeypatch.setattr(module, "count_free", lambda: module.ROOM * block)
    assert explain_absence(model, "cpu") == ""
