"""How fast are Triton's kernels? Part of `python -m billhook_kernels.bench`, where there is a GPU.

Each against what one would call otherwise, on a weight of `size` x `size` in bf16, half of it zero where it is packed.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from billhook_kernels.masks import keep_highest, keep_highest_of_rows, keep_wanda
from billhook_kernels.packed import multiply_packed, pack_rows, unpack_rows
from billhook_kernels.patterns import keep_highest_of_groups
from billhook_kernels.statistics import add_second_moment, squared_loss_changes

CALLS = 20
"""Of each in one round, one after another, before the GPU is waited for."""

RING_BYTES = 256 * 10**6
"""Of weights that take turns in a product: more than the caches of a GPU hold."""

TOKENS = 2048

Call = Callable[[], Tensor]


@dataclass
class KernelResult:
    """A kernel against another way."""

    kernel: str
    reference: str
    seconds: list[float]
    """Of a call of the kernel, mean of CALLS, in each round."""
    reference_seconds: list[float]
    speedup: float
    """Median over the rounds of reference_seconds / seconds."""
    low: float
    """Its lower quartile."""
    high: float
    """Its upper quartile."""


def list_pairs(size: int, device: torch.device, ring_bytes: int = RING_BYTES) -> Iterator[tuple[str, str, Call, Call]]:
    """(kernel, reference, call of the one, call of the other). Raises AssertionError where they differ."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    weight_OI, x_TI, g_TO = make(size, size), make(TOKENS, size), make(TOKENS, size)
    zeros = size * size // 2
    mean_square_I = x_TI.float().square().mean(0)
    score_OI = weight_OI.float().abs() * mean_square_I.sqrt()
    alive_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    sparse_OI = torch.where(keep_highest_of_rows(score_OI, alive_OI, zeros), weight_OI, 0)
    packed = pack_rows(sparse_OI)

    def pair(kernel: str, reference: str, ours: Call, theirs: Call) -> tuple[str, str, Call, Call]:
        found, expected = ours(), theirs()
        if expected.dtype == torch.bool:
            assert torch.equal(found, expected), kernel
        else:
            room = 2**-7 * float(expected.float().abs().max())
            assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=room), kernel
        return kernel, reference, ours, theirs

    count = max(1, ring_bytes // packed.nbytes)
    packs = itertools.cycle([packed._replace(values=packed.values.clone()) for _ in range(count)])
    denses = itertools.cycle([sparse_OI.clone() for _ in range(count)])
    for rows in (1, 8):
        x_BI = make(rows, size)
        yield pair(
            f"packed product, {rows} rows of x" if rows > 1 else "packed product, 1 row of x",
            "F.linear, bf16",
            lambda x=x_BI: multiply_packed(next(packs), x),  # type: ignore[misc]
            lambda x=x_BI: F.linear(x, next(denses)),  # type: ignore[misc]
        )
    yield pair("unpacking", "a copy", lambda: unpack_rows(packed), lambda: sparse_OI.clone())
    yield pair(
        "packing", "weight[keep]", lambda: pack_rows(sparse_OI).values[:zeros], lambda: sparse_OI[sparse_OI != 0]
    )
    yield pair(
        "mask of rows",
        "torch.sort",
        lambda: keep_highest_of_rows(score_OI, alive_OI, zeros),
        lambda: _drop_lowest(score_OI, size // 2),
    )
    yield pair(
        "Wanda's score and mask",
        "torch.sort",
        lambda: keep_wanda(weight_OI, mean_square_I, zeros),
        lambda: _drop_lowest(weight_OI.float().abs() * mean_square_I.sqrt(), size // 2),
    )
    yield pair(
        "mask of the layer",
        "torch.sort",
        lambda: keep_highest(score_OI, alive_OI, zeros),
        lambda: _drop_lowest(score_OI.view(1, -1), zeros).view_as(score_OI),
    )
    yield pair(
        "mask 2:4",
        "torch.sort",
        lambda: keep_highest_of_groups(score_OI, alive_OI, 2, 4),
        lambda: _drop_lowest(score_OI.view(-1, 4), 2).view_as(score_OI),
    )

    def moment() -> Tensor:
        total_II = torch.zeros(size, size, device=device)
        add_second_moment(total_II, x_TI)
        return total_II

    yield pair("second moment", "x.float().T @ x.float()", moment, lambda: x_TI.float().T @ x_TI.float())
    part_OI = sparse_OI.float()
    yield pair(
        "changes of the loss",
        "((x @ dW.T) * g).sum(1)",
        lambda: squared_loss_changes([(x_TI, g_TO)], [part_OI]),
        lambda: ((x_TI.float() @ part_OI.T) * g_TO.float()).sum(1).double().square().sum()[None],
    )


def _drop_lowest(score_RN: Tensor, count: int) -> Tensor:
    """The mask as Wanda's published code makes it, ties by column."""
    order_RN = torch.sort(score_RN, dim=1, stable=True).indices
    return torch.ones_like(score_RN, dtype=torch.bool).scatter_(1, order_RN[:, :count], False)


def run_kernels(size: int, rounds: int, device: torch.device, ring_bytes: int = RING_BYTES) -> Iterator[KernelResult]:
    """The results, one after another; a first round warms up."""

    def measure(call: Call) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait()
        return (time.perf_counter() - began) / CALLS

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for kernel, reference, ours, theirs in list_pairs(size, device, ring_bytes):
        taken = [(measure(ours), measure(theirs)) for _ in range(1 + rounds)][1:]
        low, middle, high = statistics.quantiles([other / own for own, other in taken], n=4)
        yield KernelResult(kernel, reference, [a for a, _ in taken], [b for _, b in taken], middle, low, high)
