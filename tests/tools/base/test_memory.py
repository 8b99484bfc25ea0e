"""Memory as the groups of processes have it that this one is in."""

from pathlib import Path

import pytest

from tools.base import memory
from tools.base.memory import count_free, count_memory

GB = 2**30


def write_group(directory: Path, version: int, limit: str, used: int, kept: int) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used)), strict=True):
        (directory / name).write_text(f"{text}\n")
    (directory / "memory.stat").write_text(
        f"anon 5\n{'inactive_file' if version == 2 else 'total_inactive_file'} {kept}\n"
    )


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """What there is, and is free, without any group; about so much, for others take of it."""
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    return count_memory(), count_free()


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_the_group_is_one(version: int, whole: tuple[int, int], tmp_path: Path) -> None:
    own, root = (
        ("0::/jobs/mine\n", "groups") if version == 2 else ("3:cpu:/x\n2:memory,pids:/jobs/mine\n", "groups/memory")
    )
    (tmp_path / "own").write_text(own)
    assert count_memory() == whole[0], "of a group that is not there"
    write_group(tmp_path / root / "jobs" / "mine", version, "max" if version == 2 else str(2**63 - 4096), 7, 1)
    assert count_memory() == whole[0] and count_free() > GB // 8
    write_group(tmp_path / root / "jobs", version, str(GB // 8), GB // 16, GB // 32)
    assert (count_memory(), count_free()) == (GB // 8, GB // 8 - GB // 16 + GB // 32), "of the group around it"
    write_group(tmp_path / root, version, str(GB // 64), GB // 32, 0)
    assert (count_memory(), count_free()) == (GB // 64, 0)
