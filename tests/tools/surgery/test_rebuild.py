"""What stays computes what it did, and loads as a stock model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.cuts import IDS, compute_logits, make_config, make_cut, make_model
from tests.tiny import ARCHITECTURES, make_tiny_model, make_tiny_tokenizer
from tools.base.errors import UserError
from tools.models.layers import find_layers
from tools.models.save import export_model
from tools.plans.cuts import Counts
from tools.surgery.parts import Cut, Fit, count_weights, find_parts, without_fits
from tools.surgery.rebuild import _cut_lists, build_cut, check_cut, mask_input

GROUPED = ("llama", "qwen3", "gemma3", "qwen3_moe")
"""Architectures whose heads can be cut."""


CASES = [
    *((architecture, parts) for architecture in ARCHITECTURES for parts in ("neurons", "blocks")),
    *((architecture, "heads") for architecture in GROUPED),
    ("llama", "both"),
    ("qwen3_moe", "blocks"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "parts"), CASES)
def test_stock_transformers_load_it(architecture: str, parts: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = make_tiny_model(architecture).to(dtype)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    cut = make_cut(dense, parts)
    model = build_cut(dense, cut)
    check_cut(dense, cut, build_cut(dense, without_fits(cut)), IDS[0])
    export_model(model, make_tiny_tokenizer(), tmp_path / "model", "card")
    answer: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="auto", output_loading_info=True
    )
    loaded, report = answer
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    assert torch.equal(compute_logits(loaded), compute_logits(model))
    assert count_weights(loaded) == count_weights(model) < count_weights(dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    prompt = IDS[:1, :8]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_all_blocks_keep_the_same_widths(architecture: str) -> None:
    model = build_cut(dense := make_tiny_model(architecture), make_cut(dense, "both"))
    shapes = {
        **{"self_attn.q_proj": (16, 32), "self_attn.k_proj": (8, 32), "self_attn.v_proj": (8, 32)},
        **{"self_attn.o_proj": (32, 16), "mlp.gate_proj": (36, 32), "mlp.up_proj": (36, 32)},
        **{"mlp.down_proj": (32, 36)},
    }
    layers = find_layers(model)
    assert len(layers) == 14
    assert all(tuple(layer.weight_OI.shape) == shapes[layer.kind] for layer in layers)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 36, 2)


def test_gpt2_s_width_is_said_where_the_config_left_it_out() -> None:
    dense = make_model(make_config("gpt2", n_inner=None))
    assert dense.config.n_inner is None
    assert build_cut(dense, make_cut(dense, "neurons")).config.n_inner == 128 - 12


def test_a_cut_that_computes_something_else_is_refused() -> None:
    dense = make_tiny_model("llama")
    parts = find_parts(dense, "heads")
    first, second = (Cut(Counts(heads=1), [Fit(part, torch.tensor([unit])) for part in parts]) for unit in (0, 1))
    check_cut(dense, first, build_cut(dense, first), IDS[0])
    with pytest.raises(UserError, match=r"^the cut LlamaForCausalLM does not compute what the dense one does without"):
        check_cut(dense, first, build_cut(dense, second), IDS[0])


@pytest.mark.parametrize("wrong", [0, 1])
def test_one_block_that_computes_something_else_is_enough(wrong: int) -> None:
    dense = make_tiny_model("llama")
    parts = find_parts(dense, "heads")
    fits = [[Fit(part, torch.tensor([unit])) for part in parts] for unit in (0, 1)]
    cut, other = Cut(Counts(heads=1), fits[0]), Cut(Counts(heads=1), fits[0][:wrong] + fits[1][wrong : wrong + 1])
    other.fits.extend(fits[0][wrong + 1 :])
    with pytest.raises(UserError, match=r"^the cut LlamaForCausalLM does not compute what the dense one does without"):
        check_cut(dense, cut, build_cut(dense, other), IDS[0])


def test_what_goes_is_zero_wherever_its_layer_runs() -> None:
    """A model that is streamed has its weights in CPU memory, and runs elsewhere."""
    (masked,) = mask_input(torch.tensor([1.0, 0.0]))(None, (torch.ones(3, 2, device="meta"),))
    assert (masked.device.type, masked.shape) == ("meta", (3, 2))


def test_blocks_that_are_named_by_their_numbers_have_others_then() -> None:
    config = make_config("qwen3_moe", mlp_only_layers=[0])
    config.num_hidden_layers, config.mlp_only_layers, config.layer_types = 4, [0, 2, 3], ["a", "b", "c", "d"]
    _cut_lists(config, [1, 2])
    assert (config.mlp_only_layers, config.layer_types) == ([0, 1], ["a", "d"])
    config.moe_layers, config.num_hidden_layers = [0, 1], 2  # as many as there are blocks: no list of kinds
    _cut_lists(config, [0])
    assert config.moe_layers == [0]
