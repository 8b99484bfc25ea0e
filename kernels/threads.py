"""Small operations on one CPU thread."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
