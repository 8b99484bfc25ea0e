"""Which kernels are chosen, and what is said where they cannot be."""

import sys
from collections.abc import Callable

import pytest
import torch

from billhook_kernels import native
from billhook_kernels.dispatch import choose_kernel, choose_product, explain_torch, explain_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16
Ask = Callable[[str], None]


@pytest.fixture(autouse=True)
def machine(ask_for_kernels: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with a native kernel for bf16 alone, a GPU of its time, triton without its interpreter."""
    monkeypatch.setattr(native, "explain_absence", lambda dtype: "" if dtype == BF16 else "there is none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "triton", torch)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def describe() -> list[tuple[str, str, str]]:
    """(kernels, product, why torch) for bf16 on the CPU, fp16 on the CPU, bf16 on the GPU."""
    places = [(BF16, CPU), (FP16, CPU), (BF16, GPU)]
    return [
        (choose_kernel(device), choose_product(dtype, device), explain_torch(dtype, device)) for dtype, device in places
    ]


def test_each_device_has_its_own() -> None:
    assert describe() == [("torch", "native", ""), ("torch", "torch", "there is none"), ("triton", "triton", "")]
    assert choose_kernel(torch.device("mps")) == choose_product(BF16, torch.device("mps")) == "torch"
    assert explain_torch(BF16, torch.device("mps")) == "native kernels do not run on mps"


def test_torch_can_be_asked_for(ask_for_kernels: Ask) -> None:
    ask_for_kernels("torch")
    assert describe() == [("torch", "torch", "")] * 3


def test_native_kernels_are_packed_products_alone(ask_for_kernels: Ask) -> None:
    ask_for_kernels("native")
    assert (choose_kernel(CPU), choose_kernel(GPU), choose_product(BF16, CPU)) == ("torch", "torch", "native")
    for dtype, device, absence in ((FP16, CPU, "there is none"), (BF16, GPU, "native kernels do not run on cuda")):
        with pytest.raises(ValueError, match=f"^BILLHOOK_KERNELS asks for native kernels, but {absence}$"):
            choose_product(dtype, device)


def test_triton_is_for_the_gpu_and_leaves_the_rest_to_torch(ask_for_kernels: Ask) -> None:
    ask_for_kernels("triton")
    assert (choose_kernel(CPU), choose_kernel(GPU), choose_product(BF16, GPU)) == ("torch", "triton", "triton")
    line = "^BILLHOOK_KERNELS asks for triton kernels, but triton kernels do not run on cpu$"
    with pytest.raises(ValueError, match=line):
        choose_product(BF16, CPU)


def test_triton_under_its_interpreter_runs_where_it_is_asked_to(
    ask_for_kernels: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (choose_kernel(CPU), choose_product(BF16, CPU)) == ("torch", "native")
    ask_for_kernels("triton")
    assert (choose_kernel(CPU), choose_product(BF16, CPU)) == ("triton", "triton")


def test_a_machine_without_triton_says_why(ask_for_kernels: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(reason: str) -> None:
        ask_for_kernels("")
        assert (choose_kernel(GPU), choose_product(BF16, GPU), explain_torch(BF16, GPU)) == ("torch", "torch", reason)
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
    for call in (lambda: choose_kernel(CPU), lambda: choose_product(BF16, GPU), lambda: explain_torch(BF16, CPU)):
        with pytest.raises(ValueError, match=r"^BILLHOOK_KERNELS is 'cuda'; it may be torch, triton or native$"):
            call()
