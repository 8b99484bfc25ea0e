"""Which kernels are chosen, and what is said where they cannot be."""

import sys
from collections.abc import Callable

import pytest
import torch

from billhook_kernels.dispatch import choose_kernel, explain_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Ask = Callable[[str], None]


@pytest.fixture(autouse=True)
def machine(ask_for_kernels: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of its time, triton without its interpreter."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "triton", torch)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_each_device_has_its_own() -> None:
    assert [choose_kernel(device) for device in (CPU, GPU, torch.device("mps"))] == ["torch", "triton", "torch"]


def test_torch_can_be_asked_for(ask_for_kernels: Ask) -> None:
    ask_for_kernels("torch")
    assert choose_kernel(CPU) == choose_kernel(GPU) == "torch"


def test_triton_is_for_the_gpu_and_leaves_the_rest_to_torch(ask_for_kernels: Ask) -> None:
    ask_for_kernels("triton")
    assert (choose_kernel(CPU), choose_kernel(GPU)) == ("torch", "triton")


def test_triton_under_its_interpreter_runs_where_it_is_asked_to(
    ask_for_kernels: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernel(CPU) == "torch"
    ask_for_kernels("triton")
    assert choose_kernel(CPU) == "triton"


def test_a_machine_without_triton_says_why(ask_for_kernels: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(reason: str) -> None:
        ask_for_kernels("")
        assert (choose_kernel(GPU), explain_triton(GPU)) == ("torch", reason)
        ask_for_kernels("triton")
        for device in (CPU, GPU):
            with pytest.raises(ValueError) as error:  # noqa: PT011
                choose_kernel(device)
            assert str(error.value) == f"BILLHOOK_KERNELS asks for triton kernels, but {reason}"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    check("this GPU has compute capability 7.5, and triton needs 8.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check("there is no GPU that torch can use")
    monkeypatch.setitem(sys.modules, "triton", None)
    check("triton is not installed (pip install 'billhook[triton]')")
    assert explain_triton(CPU) == explain_triton(GPU)


def test_a_name_that_is_none_is_refused(ask_for_kernels: Ask) -> None:
    ask_for_kernels("cuda")
    with pytest.raises(ValueError, match=r"^BILLHOOK_KERNELS is 'cuda'; it may be torch or triton$"):
        choose_kernel(CPU)
