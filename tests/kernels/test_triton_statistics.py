"""Sums of Triton's kernels against float64, over several tiles with ragged edges."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from billhook_kernels.statistics import add_second_moment, squared_loss_changes
from tests.kernels.layers import DTYPES

triton_statistics = pytest.importorskip("billhook_kernels.triton_statistics", reason="triton is not installed")


@pytest.fixture(autouse=True)
def small_tiles(
    ask_for_kernels: Callable[[str], None], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> torch.device:
    monkeypatch.setattr(triton_statistics, "TILE", 16)
    monkeypatch.setattr(triton_statistics, "STEP", 16)
    ask_for_kernels("triton")
    return device


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_moment_adds_up_over_batches(dtype: torch.dtype, device: torch.device) -> None:
    total_II = torch.zeros(37, 37, device=device)
    exact_II = torch.zeros(37, 37, dtype=torch.float64)
    for seed, tokens in enumerate((50, 1, 0, 16)):
        x_TI = make(tokens, 37, seed=seed, dtype=dtype)
        add_second_moment(total_II, x_TI.to(device))
        exact_II += x_TI.double().T @ x_TI.double()
    torch.testing.assert_close(total_II.cpu().double(), exact_II, rtol=1e-5, atol=1e-4)
    assert torch.equal(total_II, total_II.T)


def test_second_moment_of_a_transposed_view(device: torch.device) -> None:
    x_TI, total_II = make(20, 30, seed=1), torch.zeros(20, 20, device=device)
    add_second_moment(total_II, x_TI.T.to(device))
    torch.testing.assert_close(total_II.cpu(), x_TI @ x_TI.T)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_loss_changes(dtype: torch.dtype, wide: bool, device: torch.device) -> None:
    """Of a weight in the inputs' dtype, and of one in fp32 that it would round."""
    pairs = [(make(t, 40, seed=t, dtype=dtype), make(t, 21, seed=t + 1, dtype=dtype)) for t in (33, 4)]
    parts = [make(21, 40, seed=seed, dtype=torch.float32 if wide else dtype).float() for seed in (5, 6)]
    found = squared_loss_changes([(x.to(device), g.to(device)) for x, g in pairs], [p.to(device) for p in parts])
    removed_OI, exact = torch.zeros(21, 40, dtype=torch.float64), []
    for part_OI in parts:
        removed_OI += part_OI
        changes = [((x.double() @ removed_OI.T) * g.double()).sum(1) for x, g in pairs]
        exact.append(sum(float(change.square().sum()) for change in changes))
    assert found.dtype == torch.float64
    assert found.shape == (2, 2) and found.sum(1).tolist() == pytest.approx(exact, rel=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_input_spoils_its_own_token_alone(device: torch.device) -> None:
    x_TI, part_OI, g_TO = make(3, 5, seed=1), make(4, 5, seed=2), make(3, 4, seed=3)
    x_TI[1, 2] = torch.inf
    part_OI[:, 2], g_TO[1] = 1.0, 1.0
    expected_T = ((x_TI @ part_OI.T) * g_TO).sum(1)
    found_T = triton_statistics.sum_changes(x_TI.to(device), part_OI.to(device), g_TO.to(device))
    torch.testing.assert_close(found_T.cpu(), expected_T)
    assert expected_T[1] == torch.inf
