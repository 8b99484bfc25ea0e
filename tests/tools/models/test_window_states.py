"""States between blocks: the same bytes in memory and on disk."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tools.base.memory
import tools.models.unfinished
from tools.base.errors import UserError
from tools.models.unfinished import hold_states, stack_states


def make_states(tokens: int, dtype: torch.dtype = torch.bfloat16) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return {window: torch.randn(1, tokens, 6, generator=generator).to(dtype) for window in (3, 5, 11)}


def stream_to(monkeypatch: pytest.MonkeyPatch, scratch: Path, free: int) -> None:
    """Every model is a streamed one, on a machine with so much memory."""
    monkeypatch.setattr(tools.models.unfinished, "find_stream", lambda model: SimpleNamespace(scratch=scratch))
    monkeypatch.setattr(tools.base.memory, "count_free", lambda: free)


@pytest.mark.parametrize(("tokens", "dtype"), [(7, torch.bfloat16), (16, torch.float32), (1, torch.float16)])
def test_on_disk_they_are_the_same_bytes(
    tokens: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = make_states(tokens, dtype)
    held = hold_states(None, [*states], states.__getitem__)
    stream_to(monkeypatch, tmp_path, 0)
    on_disk = hold_states(None, [*states], states.__getitem__)
    assert isinstance(held, dict) and not isinstance(on_disk, dict)
    for kept in (held, on_disk):
        kept[5] = 2 * kept[5]
        assert [*kept] == [3, 5, 11]
        wanted = torch.cat([states[3], 2 * states[5], states[11]])
        assert torch.equal(stack_states(kept), wanted)
        assert all(torch.equal(kept[window], wanted[i : i + 1]) for i, window in enumerate(states))
        assert kept[3].dtype == stack_states(kept).dtype == dtype
    assert [*tmp_path.iterdir()] == [], "the file has no name"


def test_one_state_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = make_states(4)
    stream_to(monkeypatch, tmp_path, 0)
    assert torch.equal(stack_states(hold_states(None, [5], states.__getitem__)), states[5])
    assert hold_states(None, [], states.__getitem__) == {}


def test_they_are_held_up_to_a_quarter_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = make_states(4)
    size = sum(state.nbytes for state in states.values())
    for free, held in ((4 * size, True), (4 * size - 1, False)):
        stream_to(monkeypatch, tmp_path, free)
        assert isinstance(hold_states(None, [*states], states.__getitem__), dict) is held


def test_a_model_that_is_held_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.base.memory, "count_free", lambda: 0)
    states = make_states(4)
    model: Any = SimpleNamespace()
    assert isinstance(hold_states(model, [*states], states.__getitem__), dict)


def test_where_there_is_no_directory_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    stream_to(monkeypatch, tmp_path / "file", 0)
    states = make_states(4)
    with pytest.raises(UserError, match="states between blocks"):
        hold_states(None, [*states], states.__getitem__)
