"""What tests of the tools share.

One thread for torch: on a busy machine, tiny tensors on several threads take fifty times as long.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of comparisons take longer than tiny rows."""
    monkeypatch.setattr("tools.results.comparison.plot_sparsity", lambda *_: None)
