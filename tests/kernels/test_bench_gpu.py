"""What the bench times on a GPU, here under Triton's interpreter: right, and told; never how long it takes."""

from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from billhook_kernels import bench, bench_gpu
from billhook_kernels.bench import describe_machine, make_gpu_table
from billhook_kernels.bench_gpu import list_pairs, run_kernels

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def few_tokens(ask_for_kernels: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for_kernels("triton")
    monkeypatch.setattr(bench_gpu, "TOKENS", 16)
    monkeypatch.setattr(bench_gpu, "CALLS", 1)


def test_every_kernel_is_right_and_timed(device: torch.device) -> None:
    report = describe_machine(8, 2)
    report.gpu_results = list(run_kernels(8, 2, device, ring_bytes=1))
    assert len({x.kernel for x in report.gpu_results}) == 10
    for x in report.gpu_results:
        ratios = [b / a for a, b in zip(x.seconds, x.reference_seconds, strict=True)]
        assert len(ratios) == 2 and x.speedup == pytest.approx(sum(ratios) / 2)
    console = Console(width=120, record=True)
    console.print(make_gpu_table(report))
    assert all(x.kernel in console.export_text() for x in report.gpu_results[:1])


def test_a_wrong_kernel_is_not_timed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "multiply_packed", lambda packed, x_BI: torch.zeros(1, 8))
    with pytest.raises(AssertionError, match=r"^packed product, 1 row of x$"):
        list(list_pairs(8, device, ring_bytes=1))


def test_why_nothing_is_measured(
    ask_for_kernels: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.explain_gpu() == ""
    ask_for_kernels("torch")
    assert bench.explain_gpu() == "BILLHOOK_KERNELS is torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.explain_gpu() == "no GPU here"
    ask_for_kernels("metal")
    assert bench.main([]) == 2
    assert capsys.readouterr().err == "error: BILLHOOK_KERNELS is 'metal'; it may be torch, triton or native\n"
