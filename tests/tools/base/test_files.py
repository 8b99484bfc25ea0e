"""Files are whole or absent, artifacts match their hash, and a full disk is said to be one."""

import errno
import math
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tools.base.errors import UserError
from tools.base.files import (
    is_disk_full,
    refuse_unwritable,
    write_directory,
    write_json,
    write_text,
    write_whole,
)
from tools.base.rundir import append_event
from tools.workbench.store import ArtifactStore


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def no_space(path: Path) -> NoReturn:
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- plain files -----------------------------------------------------------------------------------------------


def test_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "naïve\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "naïve\n"
    write_json(tmp_path / "new" / "b.json", {"b": [1, "é"], "a": None})
    assert (tmp_path / "new" / "b.json").read_text(encoding="utf-8") == '{\n "b": [\n  1,\n  "é"\n ],\n "a": null\n}\n'
    assert files_in(tmp_path) == ["new/a.txt", "new/b.json"]
    assert stat.S_IMODE((tmp_path / "new" / "a.txt").stat().st_mode) == 0o644


def test_bytes_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that names a file may outlive a failure of the power, and nobody makes a profile again."""
    flushed: list[tuple[int, bool]] = []
    path = tmp_path / "a.json"
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append((os.fstat(file).st_size, path.exists())))
    write_json(path, {"a": 1})
    assert flushed == [(path.stat().st_size, False)]
    append_event(tmp_path, {"type": "node"})
    log = tmp_path / "events.jsonl"
    assert flushed[1:] == [(log.stat().st_size, True)], "the log, of which a state knows the last line"


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", {"x": value})
        with pytest.raises(ValueError, match="JSON"):
            ArtifactStore(tmp_path).write_json({"x": value})
    assert files_in(tmp_path) == []


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(aside: Path) -> NoReturn:
        aside.write_text("half of the n")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert files_in(tmp_path) == ["a.txt"]


def test_a_directory_is_replaced_with_all_that_is_in_it_and_can_be_read_by_all(tmp_path: Path) -> None:
    """As of a tokenizer with several templates of chats, which lie in a directory of their own."""
    for text in ("old", "new"):

        def write(aside: Path, text: str = text) -> None:
            (aside / "templates").mkdir(mode=0o700)
            write_text(aside / "templates" / f"{text}.txt", text)
            (aside / "model").touch(0o600)

        write_directory(tmp_path / "a", write)
    assert files_in(tmp_path) == ["a/model", "a/templates/new.txt"]
    modes = [stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) for name in ("templates", "model")]
    assert modes == [0o755, 0o644]
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
        with pytest.raises(UserError, match=r"/a cannot be written: "):
            write_directory(directory, write)
        with pytest.raises(UserError, match=r"/a cannot be written: "):
            refuse_unwritable(directory)
    refuse_unwritable(tmp_path / "c" / "a")
    assert files_in(tmp_path) == ["a/model", "a/templates/new.txt", "file"]


def test_ctrl_c_leaves_nothing_either(tmp_path: Path) -> None:
    def interrupt(aside: Path) -> NoReturn:
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.txt", interrupt)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_is_one_clear_line(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "a.txt"
    if old:
        write_text(path, old)
    with pytest.raises(UserError) as refusal:
        write_whole(path, no_space)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("the disk is full (")
    assert str(refusal.value).endswith(
        f" MB free) while writing {path}; free some space, then go on: a run with --resume, any other command as before"
    )
    assert files_in(tmp_path) == (["a.txt"] if old else [])
    assert not old or path.read_text() == old


def test_what_says_that_the_disk_is_full() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "no space"))
    assert is_disk_full(OSError(errno.EDQUOT, "quota"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "denied"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    store = ArtifactStore(tiny_disk / "artifacts")
    kept = store.write_tensors({"x": torch.zeros(1000)})
    with pytest.raises(UserError, match=r"^the disk is full \(\d MB free\) while writing "):
        store.write_tensors({"x": torch.zeros(300_000)})
    with pytest.raises(UserError, match=r"^the disk is full \(\d MB free\) while writing "):
        write_text(tiny_disk / "a.txt", "x" * 2_000_000)
    assert files_in(tiny_disk) == [f"artifacts/{kept[:2]}/{kept}.safetensors"]
    with pytest.raises(OSError, match="No space left"), (tiny_disk / "filler").open("wb") as file:
        file.write(b"x" * 2_000_000)
    with pytest.raises(UserError, match=r"^the disk is full \(0 MB free\) while writing "):
        write_text(tiny_disk / "another" / "directory" / "a.txt", "x" * 5000)
    assert store.read_tensors(kept)["x"].numel() == 1000
