"""What is kept of unfinished work: whole and the last, or nothing."""

from pathlib import Path

import pytest
import torch

import tools.models.unfinished
from tests.benches import damage
from tools.measure.losses import StateFiles, forget_states
from tools.models.unfinished import UNFINISHED, KeptFiles, Marks, forget_files


def list_names(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def test_the_last_is_read_and_the_one_before_is_gone(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path / "all" / "one")
    assert kept.read() is None
    for number in range(3):
        kept.replace({"a": torch.full((2, 3), float(number)).T}, number=number, name=None)
    found = KeptFiles(tmp_path / "all" / "one").read()
    assert found is not None and (found[0]["number"], found[0]["name"]) == (2, None)
    assert torch.equal(found[1]["a"], torch.full((3, 2), 2.0))
    assert list_names(kept.directory) == [".json", ".safetensors"]
    KeptFiles(tmp_path / "all" / "two").replace({"a": torch.ones(1)})
    forget_files(kept.directory)
    assert kept.read() is None and (tmp_path / "all" / "two").is_dir()
    forget_files(tmp_path / "all" / "two")
    assert list(tmp_path.iterdir()) == [], "nor the directory that they were in"


def test_of_what_is_damaged_or_gone_nothing_is_taken(tmp_path: Path) -> None:
    for hurt in (damage, Path.unlink):
        kept = KeptFiles(tmp_path)
        kept.replace({"a": torch.ones(4)})
        [path] = tmp_path.glob("*.safetensors")
        hurt(path)
        assert kept.read() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tensors": 3}'])
def test_values_that_a_crash_left_broken_are_none_and_are_written_anew(text: str, tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path)
    kept.replace({"a": torch.ones(4)}, number=1)
    (tmp_path / "kept.json").write_text(text)
    assert kept.read() is None
    kept.replace({"a": torch.zeros(4)}, number=2)
    found = kept.read()
    assert found is not None and found[0]["number"] == 2


def test_states_are_of_their_windows_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows_BT, marks = torch.arange(6).view(2, 3), Marks(["", "a", "ab"], "abc")
    states = {window: torch.full((1, 3, 4), float(window)) for window in range(2)}
    kept = StateFiles(tmp_path, "dense", windows_BT, marks)
    kept.keep(1, states)
    assert not (tmp_path / UNFINISHED).exists(), "none of it is a minute old"
    monkeypatch.setattr(tools.models.unfinished, "KEEP_SECONDS", 0.0)
    kept.keep(3, states)
    assert kept.read() is None, "behind the last block all is done but the head"
    kept.keep(2, states)
    found = StateFiles(tmp_path, "dense", windows_BT, Marks(["", "x", "ab"], "abd")).read()
    assert found is not None and found[0] == 2
    assert all(torch.equal(found[1][window], state) for window, state in states.items())
    for dense, windows, below in (
        ("dense", windows_BT, ["", "a", "xb"]),
        ("other", windows_BT, ["", "a", "ab"]),
        ("dense", windows_BT + 1, ["", "a", "ab"]),
    ):
        assert StateFiles(tmp_path, dense, windows, Marks(below, "abc")).read() is None
    forget_states(tmp_path)
    assert list(tmp_path.iterdir()) == []
