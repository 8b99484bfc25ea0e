"""Which kernels run: torch's operations, or Triton's on a GPU. The one place that chooses.

Both give the same: masks and packed weights bit for bit, sums within the rounding of fp32. Triton's run on a GPU,
and anywhere where the variable TRITON_INTERPRET is 1, for tests.
"""

import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

INFINITY = 0x7F800000
"""Bits of +inf: every finite non-negative fp32 has a smaller pattern."""

NO_SCORE = "a pruning score is negative or not finite"

THREAD_BYTES = 256 * 1024
"""Bytes to read that are worth a thread: waking one takes as long as reading about half as much."""


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Run a block of small CPU operations on one thread, then restore the setting.

    Torch shares even a product of 16 rows among its threads, and waits at the end of each for the slowest: with one
    core busy elsewhere a loop of thousands of them takes a hundred times as long.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_waiting: list[queue.SimpleQueue[Any]] = []
"""Of each worker thread, the shares it is given."""

os.register_at_fork(after_in_child=_waiting.clear)  # threads do not live on in a forked process


def share_rows(run: Callable[[int, int], None], rows: int, size: int) -> None:
    """run(first, last) over all rows, by as many of torch's number of threads as `size` bytes are worth.

    What a share raises is raised here, once all of them have ended. A pool of futures needs twice as long to hand over
    a share.
    """
    threads = min(torch.get_num_threads(), rows, size // THREAD_BYTES)
    if threads <= 1:
        return run(0, rows)
    bounds = [rows * i // threads for i in range(threads + 1)]
    while len(_waiting) < threads - 1:
        tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(tasks,), daemon=True, name="billhook-rows").start()
        _waiting.append(tasks)
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for i in range(1, threads):
        _waiting[i - 1].put((run, bounds[i], bounds[i + 1], done))
    ends = [
        _try(run, bounds[0], bounds[1]),
        *(done.get() for _ in range(1, threads)),
    ]  # all of them, before any is told
    for error in ends:
        if error is not None:
            raise error


def _work(tasks: queue.SimpleQueue[Any]) -> None:
    while True:
        run, first, last, done = tasks.get()
        done.put(_try(run, first, last))


def _try(run: Callable[[int, int], None], first: int, last: int) -> BaseException | None:
    """What went wrong with a share; whoever waits for it must hear of its end, whatever that is."""
    try:
        run(first, last)
    except BaseException as error:
        return error
    return None


Kernel = Literal["torch", "triton"]

VARIABLE = "BILLHOOK_KERNELS"
"""Asks for one of them: they are used where they can be, torch elsewhere. Read when a device is first chosen for."""

LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU, that Triton compiles for, and from which on it multiplies bf16."""


@functools.cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bf16, sums in fp32: twice as fast as fp32, or more.

    Of CPUs those with AMX, and those with AVX512_BF16 (an EPYC made products of 576 to 4,096 inputs 1.6 to 1.9 times as
    fast by it).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    asks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(bool(ask and ask()) for ask in asks)  # what oneDNN goes by, too


@functools.cache
def choose_kernel(device: torch.device) -> Kernel:
    """What selects, packs and sums on a device: "triton" or "torch".

    Raises ValueError, in one line, when BILLHOOK_KERNELS names no kernels, or Triton's and nothing here runs them.
    """
    asked = _read_variable()
    if asked == "triton":
        _insist(asked, explain_triton(device) and explain_triton(torch.device("cuda")))
    elif asked or device.type != "cuda":
        return "torch"
    return "torch" if explain_triton(device) else "triton"


@functools.cache
def explain_triton(device: torch.device) -> str:
    """Why Triton's kernels do not run on a device; "" where they do."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install 'billhook[triton]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return f"triton kernels do not run on {device.type}"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        needs = ".".join(map(str, LEAST_CAPABILITY))
        return f"this GPU has compute capability {'.'.join(map(str, capability))}, and triton needs {needs}"
    return ""


def _read_variable() -> str:
    asked = os.environ.get(VARIABLE, "")
    if asked and asked not in get_args(Kernel):
        raise ValueError(f"{VARIABLE} is {asked[:80]!r}; it may be torch or triton")
    return asked


def _insist(asked: str, absence: str) -> None:
    if absence:
        raise ValueError(f"{VARIABLE} asks for {asked} kernels, but {absence}")
