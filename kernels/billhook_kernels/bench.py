"""How fast are the kernels? `python -m billhook_kernels.bench [--json FILE]`

On a GPU, where there is one, all of `bench_gpu.py`; on the CPU the product with packed weights, against what one
would call otherwise, one row of x, weights cold: every call takes the next weight of a ring that is larger than the
caches. A round makes a few calls of each, and the speed-up is taken round by round, so that it holds on
a busy machine better than seconds do; its quartiles show how busy the machine was. Needs about 3 GB.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from billhook_kernels.bench_gpu import KernelResult, run_kernels
from billhook_kernels.dispatch import choose_kernel, explain_triton
from billhook_kernels.native import explain_absence
from billhook_kernels.packed import PackedLinear, multiply_packed, pack_rows, settle_layers

SPARSITIES = (0.45, 0.5, 0.6)
TARGETS = {0.45: 1.35, 0.5: 1.55, 0.6: 1.8}
"""Of the speed-up over torch.mv, at 4096 x 4096."""

GPU = torch.device("cuda")

CALLS = 3
"""Of each product in one round."""

Call = Callable[[], object]


@dataclass
class Result:
    """The packed product against another."""

    reference: str
    sparsity: float
    threads: int
    seconds: list[float]
    """Of a call of the packed product, median of CALLS, in each round."""
    reference_seconds: list[float]
    speedup: float
    """Median over the rounds of reference_seconds / seconds."""
    low: float
    """Its lower quartile."""
    high: float
    """Its upper quartile."""
    target: float | None
    """What the speed-up should be at least; None where nothing was promised."""


@dataclass
class Report:
    """`--json`."""

    size: int
    rounds: int
    processor: str
    load: float
    """Processes that wanted to run in the minute before, on how many processors this is."""
    processors: int
    versions: dict[str, str]
    results: list[Result] = field(default_factory=list)
    gpu: str = ""
    """Its name, or why nothing was measured on one."""
    gpu_results: list[KernelResult] = field(default_factory=list)


def make_weight(size: int, sparsity: float) -> Tensor:
    """A random bf16 weight (O, I) with zeros strewn at random."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(size, size, generator=generator).bfloat16()
    return weight_OI.masked_fill_(torch.rand(size, size, generator=generator) < sparsity, 0)


def list_calls(weight_OI: Tensor, ring_bytes: int) -> dict[str, list[Call]]:
    """By name, a call for each copy of the weight in a ring of at least so many bytes; "packed" is the first.

    Raises AssertionError where one of them is wrong.
    """
    x_I = torch.randn(weight_OI.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    x_BI, wide_I = x_I[None], x_I.float()
    exact_O = weight_OI.double() @ x_I.double()

    def ring(size: int) -> range:
        return range(max(2, -(-ring_bytes // size)))

    def turn(weights: list[Tensor]) -> list[Tensor]:
        """For the second of two that share a ring: what the first has just read is not cold."""
        return weights[len(weights) // 2 :] + weights[: len(weights) // 2]

    packed = pack_rows(weight_OI)
    layers = [
        PackedLinear(packed._replace(mask_OW=packed.mask_OW.clone(), values=packed.values.clone()))
        for _ in ring(packed.nbytes)
    ]
    settle_layers(layers)
    packs = [layer.packed for layer in layers]
    denses = [weight_OI.clone() for _ in ring(weight_OI.nbytes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        sparse = weight_OI.float().to_sparse_csr()
    indices, columns, values = sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values()
    rows = [
        torch.sparse_csr_tensor(indices.clone(), columns.clone(), values.clone(), sparse.shape, check_invariants=False)
        for _ in ring(8 * values.numel())
    ]
    calls: dict[str, list[Call]] = {
        "packed": [lambda p=p: multiply_packed(p, x_BI) for p in packs],  # type: ignore[misc]
        "torch.mv, bf16": [lambda w=w: torch.mv(w, x_I) for w in denses],  # type: ignore[misc]
        "F.linear, bf16": [lambda w=w: F.linear(x_BI, w) for w in turn(denses)],  # type: ignore[misc]
        "torch.sparse_csr, fp32": [lambda w=w: torch.mv(w, wide_I) for w in rows],  # type: ignore[misc]
    }
    try:
        from scipy.sparse import csr_array  # only where it is installed: no other part needs it
    except ImportError:
        pass
    else:
        wide = wide_I.numpy()
        arrays = [
            csr_array((w.values().numpy(), w.col_indices().numpy(), w.crow_indices().numpy()), shape=tuple(w.shape))
            for w in turn(rows)
        ]
        calls["scipy.sparse CSR, fp32"] = [lambda a=a: torch.from_numpy(a @ wide) for a in arrays]  # type: ignore[misc]
    for name, call in calls.items():
        answer: Any = call[0]()
        assert torch.allclose(answer.double().flatten(), exact_O, rtol=2**-7, atol=1e-2), name
    return calls


def time_rounds(calls: dict[str, list[Call]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call by each name, median of the CALLS next in its ring, in each round; a first round warms up.

    In another order each round: on a busy machine the system takes the processor away after a long call, and then
    whoever comes next would always be the slow one.
    """
    order, draw = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rings = {name: itertools.cycle(ring) for name, ring in calls.items()}
    for _ in range(1 + rounds):
        draw.shuffle(order)
        for name in order:
            taken = []
            for call in itertools.islice(rings[name], CALLS):
                began = time.perf_counter()
                call()
                taken.append(time.perf_counter() - began)
            seconds[name].append(statistics.median(taken))
    return {name: taken[1:] for name, taken in seconds.items()}


def run(report: Report, threads: list[int], ring_bytes: int) -> Iterator[Result]:
    """The results, one after another; they are in the report too."""
    before = torch.get_num_threads()
    try:
        for sparsity in SPARSITIES:
            calls = list_calls(make_weight(report.size, sparsity), ring_bytes)
            for count in threads:
                torch.set_num_threads(count)
                seconds = time_rounds(calls, report.rounds)
                ours = seconds.pop("packed")
                for name, theirs in seconds.items():
                    ratios = [other / taken for taken, other in zip(ours, theirs, strict=True)]
                    promised = TARGETS[sparsity] if name.startswith("torch.mv") and report.size == 4096 else None
                    low, middle, high = statistics.quantiles(ratios, n=4)
                    result = Result(name, sparsity, count, ours, theirs, middle, low, high, promised)
                    report.results.append(result)
                    yield result
    finally:
        torch.set_num_threads(before)


def describe_machine(size: int, rounds: int) -> Report:
    """A report without results."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "llvmlite", "scipy", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        import llvmlite.binding as llvm
    except ImportError:
        processor = platform.machine()
    else:
        processor = llvm.get_host_cpu_name()
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Report(size, rounds, processor, round(os.getloadavg()[0], 2), processors, versions)


def make_table(report: Report) -> Table:
    """Medians over the rounds, the speed-up with its quartiles."""
    table = Table(title=f"{report.size} x {report.size}, one row of x, weights cold")
    for head in (
        "zero",
        "threads",
        "against",
        "ms, packed",
        "ms, other",
        "speed-up",
        "quartiles",
        "at least",
    ):
        table.add_column(head, justify="left" if head == "against" else "right")
    for x in report.results:
        met = "" if x.target is None else f"{x.target:g} ({'met' if x.speedup >= x.target else 'missed'})"
        table.add_row(
            f"{x.sparsity:.0%}",
            str(x.threads),
            x.reference,
            f"{statistics.median(x.seconds) * 1e3:.2f}",
            f"{statistics.median(x.reference_seconds) * 1e3:.2f}",
            f"{x.speedup:.2f}",
            f"{x.low:.2f} to {x.high:.2f}",
            met,
        )
    return table


def explain_gpu() -> str:
    """Why nothing is measured on a GPU, in one line; "" where all is."""
    if not torch.cuda.is_available():
        return "no GPU here"
    if reason := explain_triton(GPU):
        return reason
    return "" if choose_kernel(GPU) == "triton" else f"BILLHOOK_KERNELS is {os.environ['BILLHOOK_KERNELS']}"


def run_on_gpu(report: Report) -> Iterator[KernelResult]:
    """The results, one after another; they are in the report too."""
    for result in run_kernels(report.size, report.rounds, GPU):
        report.gpu_results.append(result)
        yield result


def make_gpu_table(report: Report) -> Table:
    """Medians over the rounds, the speed-up with its quartiles."""
    table = Table(title=f"{report.gpu}, {report.size} x {report.size}")
    for head in ("kernel", "against", "ms, kernel", "ms, other", "speed-up", "quartiles"):
        table.add_column(head, justify="left" if head in ("kernel", "against") else "right")
    for x in report.gpu_results:
        own, other = statistics.median(x.seconds) * 1e3, statistics.median(x.reference_seconds) * 1e3
        table.add_row(
            x.kernel, x.reference, f"{own:.3f}", f"{other:.3f}", f"{x.speedup:.2f}", f"{x.low:.2f} to {x.high:.2f}"
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted, 2 bad input or a machine without kernels."""
    parser = argparse.ArgumentParser(prog="python -m billhook_kernels.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", type=Path, help="Write all figures there too.")
    parser.add_argument("--size", metavar="N", type=int, default=4096, help="Side of the square weight. Default: 4096.")
    parser.add_argument("--rounds", metavar="N", type=int, default=30, help="At least 2. Default: 30.")
    parser.add_argument("--ring-mb", metavar="MB", type=int, default=640, help="Bytes of each ring. Default: 640.")
    parser.add_argument("--threads", metavar="N", type=int, nargs="+", default=[1, 2], help="Default: 1 2.")
    options = parser.parse_args(arguments)
    if min(options.size, options.rounds - 1, options.ring_mb, *options.threads) < 1:
        parser.error("all numbers must be at least 1, and --rounds 2")
    try:
        choose_kernel(torch.device("cpu"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reason, gpu_reason = explain_absence(torch.bfloat16), explain_gpu()
    if reason and gpu_reason:
        print(f"error: there is nothing to measure: {reason}; {gpu_reason}", file=sys.stderr)
        return 2
    report, console = (
        describe_machine(options.size, options.rounds),
        Console(width=None if sys.stdout.isatty() else 120),
    )
    console.print(
        f"{report.processor}, {report.processors} processors, load {report.load:g}; "
        + ", ".join(f"{name} {number}" for name, number in report.versions.items())
    )
    report.gpu = gpu_reason or torch.cuda.get_device_name(GPU)
    try:
        on_cpu = iter(()) if reason else run(report, options.threads, options.ring_mb * 10**6)
        on_gpu = iter(()) if gpu_reason else run_on_gpu(report)
        for _ in itertools.chain(on_cpu, on_gpu):
            if options.json:
                options.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        return 1
    except OSError as error:
        print(f"error: {options.json} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    finally:
        console.print(reason or make_table(report))
        console.print(gpu_reason or make_gpu_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
