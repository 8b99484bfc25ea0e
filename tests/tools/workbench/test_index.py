"""What was made before is found by its key; a line is read once, whoever writes the next."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.workbench.store import ArtifactStore, Index


def open_index(directory: Path) -> Index:
    directory.mkdir(exist_ok=True)
    return Index(ArtifactStore(directory))


def test_a_line_is_parsed_once_or_twice_however_often_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, parsed = open_index(tmp_path), list[str]()
    for number in range(50):
        index.keep_measured(["number", str(number)], {"is": number})
    read = json.loads

    def count(text: Any) -> Any:
        if isinstance(text, str) and '"key"' in text:
            parsed.append(text)
        return read(text)

    monkeypatch.setattr(json, "loads", count)
    for number in range(50):
        assert index.read_measured(["number", str(number)]) == {"is": number}
    assert len(set(parsed)) == 50 and len(parsed) == 50 + 49, "the last of them might have been torn"


def test_what_another_process_adds_is_seen_and_a_torn_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    index, other = open_index(tmp_path), open_index(tmp_path)
    assert index.read_measured(["a"]) is None
    other.keep_measured(["a"], {"x": 1})
    assert index.read_measured(["a"]) == {"x": 1}
    path = tmp_path / "index.jsonl"
    whole = path.read_bytes()
    other.keep_measured(["b"], {"x": 2})
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:20])
    assert index.read_measured(["b"]) is None and index.read_measured(["a"]) == {"x": 1}
    path.write_bytes(whole + line)
    assert index.read_measured(["b"]) == {"x": 2}
    path.write_bytes(whole + line[:20])
    index.keep_measured(["c"], {"x": 3})
    assert index.read_measured(["c"]) == {"x": 3}, "behind a line that a kill tore"


def test_of_an_index_that_is_gone_or_another_nothing_is_remembered(tmp_path: Path) -> None:
    index = open_index(tmp_path)
    index.keep_measured(["a"], {"x": 1})
    assert index.read_measured(["a"]) == {"x": 1}
    path = tmp_path / "index.jsonl"
    path.unlink()
    assert index.read_measured(["a"]) is None
    index.keep_measured(["b"], {"x": 2})
    assert index.read_measured(["a"]) is None and index.read_measured(["b"]) == {"x": 2}
    path.write_bytes(b"")
    assert index.read_measured(["b"]) is None
