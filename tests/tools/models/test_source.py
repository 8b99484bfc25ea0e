"""Dense weights that a streamed model's own files have as they were loaded: read from there again, and not copied."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.benches import ignore, open_bench, prune, same, snapshot
from tests.hub_server import HubServer, Repository
from tests.tiny import convert_here, make_tiny_model, save_tiny_gguf, save_tiny_model, tiny_settings
from tools.models import mapped, streamed
from tools.models.layers import find_layers
from tools.models.load import load_model
from tools.models.mapped import Mapped, list_in_source, map_dense, map_source, map_tensors
from tools.models.streamed import find_stream


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers whose dense weights were copied."""
    names: list[str] = []

    def copy(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> Mapped:
        given = dict(tensors)
        names.extend(given)
        return map_tensors(given.items(), directory)

    monkeypatch.setattr(mapped, "map_tensors", copy)
    return names


def stream(path: Path | str, scratch: Path, **changes: Any) -> tuple[Any, Mapped]:
    """(the model, its dense weights)."""
    model, _ = load_model(tiny_settings(path, device="stream", **changes), scratch)
    found = find_stream(model)
    assert found is not None
    return model, map_dense(find_layers(model), scratch, found.source)


def check(model: Any, dense: Mapped) -> None:
    """That they are what was loaded, in the order of the layers."""
    layers = find_layers(model)
    assert list(dense) == [layer.name for layer in layers]
    for layer in layers:
        weight_OI = dense[layer.name]
        assert weight_OI.dtype == layer.weight_OI.dtype and weight_OI.is_contiguous()
        assert torch.equal(weight_OI, layer.weight_OI), layer.name


@pytest.mark.parametrize(
    ("architecture", "dtype", "share"),
    [("llama", "fp32", 1), ("llama", "bf16", 0), ("gpt2", "fp32", 0), ("qwen3_moe", "fp32", 1 / 4)],
)
def test_those_in_the_same_form_are_not_copied(
    architecture: str, dtype: str, share: float, tmp_path: Path, copied: list[str]
) -> None:
    """The file is fp32; GPT-2's weights stand there transposed, and experts one by one, which are one in the model."""
    model, dense = stream(save_tiny_model(tmp_path / "model", architecture), tmp_path / "scratch", dtype=dtype)
    there = [name for name in dense if "self_attn" in name or architecture == "llama"] if share else []
    assert [name for name in dense if name not in copied] == there and len(there) == share * len(dense)
    check(model, dense)


def test_they_outlive_the_files_name_and_leave_the_memory(tmp_path: Path, copied: list[str]) -> None:
    path = save_tiny_model(tmp_path / "model")
    model, dense = stream(path, tmp_path / "scratch")
    shutil.rmtree(path)
    dense.let_go(dense)
    check(model, dense)
    assert copied == []


def test_several_files_and_those_of_a_hub(tmp_path: Path, copied: list[str], hub: HubServer) -> None:
    """A hub's are links in a directory of its revision."""
    path = save_tiny_model(tmp_path / "model")
    (path / "model.safetensors").unlink()
    make_tiny_model("llama").save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    check(*stream(path, tmp_path / "scratch"))

    hub.repositories["me/tiny"] = Repository("public", {file.name: file.read_bytes() for file in path.iterdir()})
    assert map_source("me/tiny") == {}, "nothing is downloaded to look at it"
    check(*stream("me/tiny", tmp_path / "scratch"))
    assert copied == []


def test_a_gguf_file_is_converted_to_such_files(
    tmp_path: Path, copied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    convert_here(monkeypatch)
    check(*stream(save_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "scratch", dtype="bf16"))
    assert copied == []


def test_what_was_changed_while_it_was_loaded_is_copied(
    tmp_path: Path, copied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = save_tiny_model(tmp_path / "model"), make_tiny_model("llama")
    (changed,) = [layer for layer in find_layers(other) if layer.name.endswith("1.mlp.up_proj")]
    changed.write(changed.weight_OI.nextafter(torch.tensor(9.0)))
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(streamed, "map_source", lambda path: map_source(str(tmp_path / "other")))
    check(*stream(path, tmp_path / "scratch"))
    assert copied == [changed.name]


def test_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    """One with a hole, of 2 TB."""
    size = 2**41
    told = json.dumps({"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    told += b" " * (-len(told) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(8 + len(told) + size)
    mapped = map_source(str(tmp_path))
    assert mapped["a"][-3:].tolist() == [0, 0, 0]
    mapped.let_go(["a"])


def test_files_that_cannot_be_mapped(tmp_path: Path) -> None:
    """Without a header, cut short, and with a tensor that begins between two numbers."""
    path = save_tiny_model(tmp_path / "model")
    file, layers = path / "model.safetensors", find_layers(make_tiny_model("llama"))
    whole = file.read_bytes()
    assert len(list_in_source(layers, map_source(str(path)))) == len(layers)
    for broken in (b"", b"\0" * 100, whole[:-1]):
        file.write_bytes(broken)
        assert map_source(str(path)) == {}
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [1 + offset for offset in entry["data_offsets"]]
    header["odd"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    file.write_bytes(len(told).to_bytes(8, "little") + told + b"\0" + whole[begin:])
    assert map_source(str(path)) == {}
    file.unlink()
    (path / "model.safetensors.index.json").write_text("{}")
    assert map_source(str(path)) == map_source(str(tmp_path / "nothing")) == {}


def test_a_run_prunes_from_them_as_from_copies(
    tmp_path: Path, copied: list[str], workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = save_tiny_model(tmp_path / "model"), []
    for name in ("source", "copies"):
        bench = open_bench(tiny_settings(path, device="stream"), tmp_path / name)
        checkpoint = prune(bench, bench.profile(ignore), 0.45)
        pruned = snapshot(bench)
        bench.pruner.restore("dense")
        found.append((checkpoint, pruned, snapshot(bench)))
        assert len(copied) == (0 if name == "source" else len(bench.weights.layers))
        bench.close()
        monkeypatch.setattr(streamed, "map_source", lambda path: Mapped({}))
    (first, *ours), (second, *theirs) = found
    assert first == second and all(map(same, ours, theirs))
