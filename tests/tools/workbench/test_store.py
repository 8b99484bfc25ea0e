"""Artifacts match their hash."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

import tools.base.files
import tools.workbench.store
from tools.base.errors import DamagedArtifact
from tools.base.files import hash_file
from tools.workbench.store import ArtifactStore


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_tensors_come_back_bit_for_bit_under_the_hash_of_the_file(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    tensors = {
        "half": torch.tensor([[1.5, -0.0], [float("nan"), float("inf")]], dtype=torch.bfloat16),
        "bits": torch.arange(7, dtype=torch.uint8),
        "view": torch.arange(6.0).reshape(2, 3).T,
    }
    digest = store.write_tensors(tensors)
    path = store.path(digest, ".safetensors")
    assert path == tmp_path / "artifacts" / digest[:2] / f"{digest}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest == hash_file(path)
    again = store.read_tensors(digest)
    assert torch.equal(again["half"].view(torch.int16), tensors["half"].view(torch.int16))
    assert torch.equal(again["bits"], tensors["bits"]) and torch.equal(again["view"], tensors["view"])
    assert store.write_tensors(tensors) == digest
    assert files_in(tmp_path) == [str(path.relative_to(tmp_path))]


def test_json_values_do_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    digest = store.write_json({"b": 0.1, "a": ["é"]})
    assert store.write_json({"a": ["é"], "b": 0.1}) == digest
    assert store.read_json(digest) == {"a": ["é"], "b": 0.1}
    assert store.has(digest, ".json") and not store.has(digest, ".safetensors")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "delete"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    store = ArtifactStore(tmp_path)
    tensors, value = store.write_tensors({"x": torch.ones(100)}), store.write_json([1, 2, 3])
    for digest, suffix, read in ((tensors, ".safetensors", store.read_tensors), (value, ".json", store.read_json)):
        path = store.path(digest, suffix)
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b"", "delete": b""}[damage])
        if damage == "delete":
            path.unlink()
        sentence = "is missing" if damage == "delete" else "is damaged: its content does not match its hash"
        with pytest.raises(DamagedArtifact) as refusal:
            read(digest)
        assert str(refusal.value) == f"artifact {path} {sentence}"
        assert not store.has(digest, suffix)


def test_writing_again_mends_a_damaged_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    digest = store.write_json([1, 2, 3])
    store.path(digest, ".json").write_text("[1, 2, 4]")
    assert store.write_json([1, 2, 3]) == digest
    assert store.read_json(digest) == [1, 2, 3]


def test_a_file_left_by_a_killed_process_is_no_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (tmp_path / ".new.json").write_text("[1, 2")
    digest = store.write_json([1, 2, 3])
    assert store.read_json(digest) == [1, 2, 3]
    assert files_in(tmp_path) == [f"{digest[:2]}/{digest}.json"]


def test_a_file_that_has_rested_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hashed = ArtifactStore(tmp_path), list[str]()
    digest = store.write_tensors({"x": torch.ones(100)})
    path = store.path(digest, ".safetensors")
    monkeypatch.setattr(tools.base.files, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    store.read_tensors(digest)
    store.read_tensors(digest)
    assert len(hashed) == 2, "one that has just been written could change again unseen"
    monkeypatch.setattr(tools.workbench.store, "RESTED_NS", 0)
    assert store.has(digest, ".safetensors") and torch.equal(store.read_tensors(digest)["x"], torch.ones(100))
    assert len(hashed) == 3
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DamagedArtifact, match="is damaged"):
        store.read_tensors(digest)
    path.unlink()
    with pytest.raises(DamagedArtifact, match="is missing"):
        store.read_tensors(digest)
