"""Rows shared among threads."""

import threading
from collections.abc import Iterator

import pytest
import torch

from billhook_kernels.dispatch import THREAD_BYTES, share_rows


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_a_share_raises_comes_out_and_the_threads_live_on(place: int) -> None:
    raised: list[BaseException] = []
    done = [False] * 9

    def run(first: int, last: int) -> None:
        if first == 3 * place:
            raise MemoryError("no room for these rows")
        done[first:last] = [True] * (last - first)

    def work() -> None:
        try:
            share_rows(run, 9, 9 * THREAD_BYTES)
        except MemoryError as error:
            raised.append(error)

    caller = threading.Thread(target=work, daemon=True)  # a share that nobody hears of would be waited for for ever
    caller.start()
    caller.join(60)
    assert not caller.is_alive() and [str(error) for error in raised] == ["no room for these rows"]
    assert done == [row // 3 != place for row in range(9)]  # the other shares ended before it was told

    again: list[int] = []
    share_rows(lambda first, last: again.extend(range(first, last)), 9, 9 * THREAD_BYTES)
    assert sorted(again) == list(range(9))
