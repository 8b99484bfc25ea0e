"""One thread for torch: on a busy machine, tiny tensors on several threads take fifty times as long."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels run: under its interpreter, or on a GPU, as tests/conftest.py has it."""
    pytest.importorskip("triton", reason="triton is not installed")
    return torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
