"""Small operations on one CPU thread, and rows shared among several."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
