"""Models written as .gguf files: what transformers reads of them is what was written, whatever was cut."""

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from tests.tiny import make_tiny_model, make_tiny_tokenizer, save_tiny_gguf, save_tiny_model, tiny_settings
from tools import export
from tools.base.errors import UserError
from tools.models.gguf import list_changed, write_gguf
from tools.models.load import load_model
from tools.models.mapped import map_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_source(directory: Path, architecture: str, **more: Any) -> Path:
    """A .gguf file of the tiny tokenizer and no weights, whose architecture has other names of the same sizes."""
    dense = gguf.GGUFReader(save_tiny_gguf(directory / "llama.gguf"))
    writer = gguf.GGUFWriter(directory / f"{architecture}.gguf", architecture)
    for name, field in dense.fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    for name, value in more.items():
        writer.add_array(f"{architecture}.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / f"{architecture}.gguf"


def make_tiny_qwen2(**changes: int) -> Any:
    """With biases that are not zero."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **changes}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"intermediate_size": 24, "num_hidden_layers": 1}),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen2", {"intermediate_size": 24, "num_hidden_layers": 1}),
    ],
)
def test_what_is_read_is_what_was_written(
    architecture: str, changes: dict[str, int], dtype: str, tmp_path: Path
) -> None:
    llama = architecture == "llama"
    source = save_tiny_gguf(tmp_path / "dense.gguf") if llama else write_source(tmp_path, architecture)
    model = make_tiny_model("llama", **changes) if llama else make_tiny_qwen2(**changes)
    model.to(DTYPES[dtype]).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", source, tmp_path / "made.gguf")
    read, tokenizer = load_model(tiny_settings(tmp_path / "made.gguf", dtype=dtype))
    assert list_changed(read, tmp_path / "model") == []
    given = AutoConfig.from_pretrained(tmp_path / "model")
    for size in ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(read.config, size) == getattr(given, size), size
    written, _ = load_model(tiny_settings(tmp_path / "model", dtype=dtype))
    ids = torch.arange(1, 20)[None]
    assert torch.equal(read(ids).logits, written(ids).logits)
    assert tokenizer.decode(tokenizer("a word")["input_ids"]) == "a word"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "made.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[dtype]


def test_a_number_that_differs_is_named(tiny_llama: Path) -> None:
    model = make_tiny_model("llama", seed=0)
    name = "model.layers.1.mlp.up_proj.weight"
    assert list_changed(model, tiny_llama) == []
    model.state_dict()[name][3, 4] += 1
    assert list_changed(model, tiny_llama) == [name]
    assert name in map_source(str(tiny_llama))


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    phi = write_source(tmp_path, "phi2")
    model = save_tiny_model(tmp_path / "model", "llama")
    by_hand = re.escape(f"here; llama.cpp may: python convert_hf_to_gguf.py {model} --outfile model.gguf")
    with pytest.raises(UserError, match=rf"^models of phi2 are not written as \.gguf {by_hand}$"):
        write_gguf(model, phi, tmp_path / "made.gguf")
    uneven = write_source(tmp_path, "qwen2", feed_forward_length=[48, 24])
    with pytest.raises(UserError, match=r"^qwen2\.feed_forward_length differs from block to block in the model's own "):
        write_gguf(model, uneven, tmp_path / "made.gguf")
    normed = save_tiny_model(tmp_path / "normed", "qwen3")
    with pytest.raises(
        UserError, match=r"^llama\.cpp has no name for model\.layers\.0\.self_attn\.k_norm\.weight; nothing"
    ):
        write_gguf(normed, save_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "made.gguf")
    assert not (tmp_path / "made.gguf").exists()


def test_a_source_that_is_no_such_file_is_refused_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not one")
    with pytest.raises(UserError, match=r"broken\.gguf cannot be read as a \.gguf file: .+$"):
        write_gguf(tiny_llama, tmp_path / "broken.gguf", tmp_path / "made.gguf")


def test_what_cannot_be_read_back_has_the_command_that_may_write_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers takes the heads of Qwen2 to fill its width, whatever the file says."""
    model, source = make_tiny_qwen2(), write_source(tmp_path, "qwen2")
    model.config.update({"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1})
    fewer = Qwen2ForCausalLM(model.config)
    fewer.save_pretrained(tmp_path / "cut")
    make_tiny_tokenizer().save_pretrained(tmp_path / "cut")
    assert export.main([str(tmp_path / "cut"), "--gguf", str(tmp_path / "cut.gguf"), "--dense", str(source)]) == 2
    assert capsys.readouterr().err.endswith(
        "error: what is written cannot be read back here; llama.cpp may: python convert_hf_to_gguf.py "
        f"{tmp_path / 'cut'} --outfile model.gguf\n"
    )
    assert [*tmp_path.glob("*cut*.gguf")] == []
