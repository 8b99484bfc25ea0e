"""What the bench times is right and told; never how long it takes."""

import json
from pathlib import Path

import pytest
import torch

from billhook_kernels import bench
from billhook_kernels.bench import SPARSITIES, TARGETS, list_calls, main, make_weight
from billhook_kernels.native import explain_absence

pytestmark = pytest.mark.skipif(bool(explain_absence(torch.bfloat16)), reason=explain_absence(torch.bfloat16))
FLAGS = ["--size=96", "--rounds=2", "--ring-mb=1", "--threads", "1"]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_ring_is_larger_than_it_must_be() -> None:
    weight_OI = make_weight(96, 0.5)
    calls = list_calls(weight_OI, 200_000)
    assert list(calls)[:4] == ["packed", "torch.mv, bf16", "F.linear, bf16", "torch.sparse_csr, fp32"]
    kept = int((weight_OI != 0).sum())
    sizes = {"packed": 4 * 96 * 3 + 2 * (kept + 32) + 8 * 96, "torch.mv, bf16": 2 * 96 * 96}
    for name, size in sizes.items():
        assert len(calls[name]) == -(-200_000 // size)


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "multiply_packed", lambda packed, x_BI: torch.zeros(1, 96))
    with pytest.raises(AssertionError, match=r"^packed$"):
        list_calls(make_weight(96, 0.5), 1)


@pytest.mark.usefixtures("no_gpu")
def test_the_report_holds_every_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--json", str(tmp_path / "bench.json")]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert (report["size"], report["rounds"]) == (96, 2)
    results = report["results"]
    names = {x["reference"] for x in results}
    assert len(results) == len(names) * len(SPARSITIES) and "torch.mv, bf16" in names
    for x in results:
        ratios = [b / a for a, b in zip(x["seconds"], x["reference_seconds"], strict=True)]
        assert len(ratios) == 2 and x["speedup"] == pytest.approx(sum(ratios) / 2)
        assert x["low"] <= x["speedup"] <= x["high"] and x["target"] is None and x["threads"] == 1
    printed = capsys.readouterr().out
    assert "one row of x, weights cold" in printed and printed.endswith("\nno GPU here\n")
    assert (report["gpu"], report["gpu_results"]) == ("no GPU here", [])
    assert set(TARGETS) == set(SPARSITIES)


@pytest.mark.usefixtures("no_gpu")
def test_bad_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds=1"])
    assert "all numbers must be at least 1, and --rounds 2" in capsys.readouterr().err
    assert main([*FLAGS, "--json", str(tmp_path / "no" / "bench.json")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
    monkeypatch.setattr(bench, "explain_absence", lambda dtype: "this processor lacks avx512vbmi2")
    assert main(FLAGS) == 2
    assert (
        capsys.readouterr().err == "error: there is nothing to measure: this processor lacks avx512vbmi2; no GPU here\n"
    )
