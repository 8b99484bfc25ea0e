"""An exported model is a plain transformers directory."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.tiny import (
    ARCHITECTURES,
    MIXTURES,
    VOCABULARY,
    make_tiny_model,
    make_tiny_tokenizer,
    save_tiny_gguf,
    save_tiny_model,
    tiny_settings,
)
from tools.base.errors import UserError
from tools.models.layers import find_layers
from tools.models.load import load_model
from tools.models.save import export_model


def export_pruned(architecture: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    source = save_tiny_model(directory.with_name("source"), architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    shutil.rmtree(source)
    for layer in find_layers(model):
        layer.write(torch.where(layer.weight_OI.abs() > 0.1, layer.weight_OI, 0))
    export_model(model, make_tiny_tokenizer(), directory, "# A card\n")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_transformers_load_it(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = export_pruned(architecture, tmp_path / "model", dtype)
    answer: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="auto", output_loading_info=True
    )
    loaded, report = answer
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(24)[None] % VOCABULARY
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for ours, theirs in zip(find_layers(model), find_layers(loaded), strict=True):
        assert torch.equal(ours.weight_OI == 0, theirs.weight_OI == 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("import this")["input_ids"] == make_tiny_tokenizer()("import this")["input_ids"]


def test_a_dequantised_gguf_is_exported_without_its_quantisation_and_nothing_is_pickled(tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(tiny_settings(path))
    path.unlink()
    export_model(model, tokenizer, tmp_path / "model", "card")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config", "_pre_quantization_dtype"} & config.keys()
    assert config["dtype"] == "float32"
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    assert (tmp_path / "model" / "README.md").read_text() == "card"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for layer, again in zip(find_layers(model), find_layers(loaded), strict=True):
        assert torch.equal(layer.weight_OI, again.weight_OI)


def test_files_can_be_shared(tmp_path: Path) -> None:
    export_pruned("llama", tmp_path / "model")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "model").iterdir())


def test_exporting_again_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    (tmp_path / ".model.new").mkdir()  # left by a killed process
    export_pruned("gpt2", tmp_path / "model")
    assert not (tmp_path / "model" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_pruned("llama", tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_text()
    tokenizer = make_tiny_tokenizer()

    def fail(directory: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    full = r"^the disk is full \(\d+ MB free\) while writing .*model; free some space, then go on: a run with --resume"
    with pytest.raises(UserError, match=full):
        export_model(make_tiny_model("gpt2"), tokenizer, tmp_path / "model", "card")
    assert (tmp_path / "model" / "config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_a_streamed_model_is_written_as_one_that_is_held_block_by_block(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are taken apart on their way to the files: those of all blocks at once would be most of the model."""
    source = save_tiny_model(tmp_path / "source", architecture)
    held, tokenizer = load_model(tiny_settings(source))
    export_model(held, tokenizer, tmp_path / "held", "")
    converted: list[set[str]] = []
    convert = transformers.core_model_loading.revert_weight_conversion

    def note(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converted.append({name.partition(".layers.")[2].partition(".")[0] for name in state})
        return convert(model, state)

    streamed, _ = load_model(tiny_settings(source, device="stream"), tmp_path / "scratch")
    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", note)
    export_model(streamed, tokenizer, tmp_path / "streamed", "")
    assert len(converted) == 3 and all(len(blocks) == 1 for blocks in converted), "two blocks, and what is in none"
    ours, theirs = (read_tensors(tmp_path / name) for name in ("streamed", "held"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert (tmp_path / "streamed" / "config.json").read_bytes() == (tmp_path / "held" / "config.json").read_bytes()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [], "files without names"


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All that lies in a model's files."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
