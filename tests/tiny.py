"""Tiny random models of several architectures, and a small tokenizer: real transformers objects, built in moments."""

import copy
import functools
import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tools.base.settings import TeamSettings

VOCABULARY = 320
HIDDEN = 32
BLOCKS = 2
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "opt")
"""What can be pruned whole."""
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")
"""Whose experts are fused, those of the last one transposed, interleaved and with biases; their routers stay dense.
`make_tiny_model` also knows "llama4_text", of whose experts each reads a row of every token, and "jetmoe", whose
experts, and so nearly all weights of its blocks, cannot be pruned."""
SHARING = ("gemma3n", "gemma4")
"""Four blocks, of which the last two read the keys and values of the two before."""

# Weights large enough that attention, norms and soft caps do something: logits of a few units.
_SPREAD = 0.3
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_DECODER: dict[str, Any] = _TOKENS | {
    **{"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 4096, "initializer_range": _SPREAD},
}
_SHARING: dict[str, Any] = _DECODER | {
    **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    **{"sliding_window": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": _DECODER | {"tie_word_embeddings": True},
    "qwen3": _DECODER | {"tie_word_embeddings": False},
    "gemma3_text": _DECODER | {"sliding_window": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3n_text": _SHARING | {"laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": _SHARING | {"global_head_dim": 16},
    "gpt2": _TOKENS
    | {
        "n_embd": HIDDEN,
        "n_layer": BLOCKS,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": 256,
        "initializer_range": _SPREAD,
    },
    "opt": _TOKENS
    | {"hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    | {"ffn_dim": 48, "max_position_embeddings": 256, "init_std": _SPREAD},
    "qwen3_moe": _DECODER
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False},
    "mixtral": _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "gpt_oss": _DECODER
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "sliding_window": 16}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "llama4_text": _DECODER
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 16, "intermediate_size_mlp": 48},
    "jetmoe": _TOKENS
    | {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_key_value_heads": 2, "kv_channels": 8}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "max_position_embeddings": 256}
    | {"initializer_range": _SPREAD},
}


def make_tiny_config(architecture: str, **changes: Any) -> Any:
    """The config of a decoder of width 32, with two blocks, or four where they share."""
    name = f"{architecture}_text" if architecture.startswith("gemma") else architecture
    return transformers.AutoConfig.for_model(name, **{**_OPTIONS[name], **changes})


def make_tiny_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A model with seeded random weights, fp32, in eval mode, its weights frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(make_tiny_config(architecture, **changes))
    return model.float().eval().requires_grad_(False)


@functools.cache
def make_tiny_tokenizer() -> Any:
    """A byte-level BPE of 320 tokens, trained on a little of Python's own documentation."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer

    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(
        (topics[name] for name in sorted(topics)[:10]),
        vocab_size=VOCABULARY,
        min_frequency=2,
        show_progress=False,
        special_tokens=["<|end|>"],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


@functools.cache
def make_beginning_tokenizer() -> Any:
    """The same tokenizer, which begins a text with a beginning-of-sequence token, as those of Llama and Gemma do.

    It is the byte 0, which is in no text: token 0 pads, so that tiny models embed it as nothing.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(make_tiny_tokenizer())
    tokenizer.bos_token = bos = "\N{LATIN CAPITAL LETTER A WITH MACRON}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def save_tiny_model(directory: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model and its tokenizer as transformers would; the directory."""
    make_tiny_model(architecture, seed, **changes).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def save_biased_model(directory: Path, architecture: str) -> Path:
    """As `save_tiny_model`, with biases drawn where there are some: a model that nobody trained has zeros."""
    model = make_tiny_model(architecture)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


class _Here(nullcontext[None]):
    """A pool of processes that is this one."""

    def __enter__(self) -> Any:
        return self

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def convert_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert .gguf files in this process, which has all modules by now."""
    monkeypatch.setattr("tools.models.streamed.ProcessPoolExecutor", lambda count, mp_context: _Here())


def save_tiny_gguf(path: Path, seed: int = 0) -> Path:
    """Save the tiny Llama and its tokenizer as one GGUF file, its matrices quantised to 8 bits where they can be."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(_DECODER["intermediate_size"])
    writer.add_head_count(_DECODER["num_attention_heads"])
    writer.add_head_count_kv(_DECODER["num_key_value_heads"])
    writer.add_rope_dimension_count(_DECODER["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)

    raw = json.loads(make_tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(raw["vocab"], key=raw["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (VOCABULARY - 1))
    writer.add_token_merges([" ".join(merge) for merge in raw["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    for name, tensor in make_tiny_model("llama", seed).state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = tensor.numpy()
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:  # GGUF interleaves the two halves that a rotary embedding turns into one another
                split = array.reshape(_DECODER[heads], 2, -1, HIDDEN)
                array = split.swapaxes(1, 2).reshape(array.shape)
        for part, short in _GGUF_NAMES.items():
            name = name.replace(part, short)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 and array.shape[1] % 32 == 0 else None
        writer.add_tensor(name, gguf.quantize(array, kind) if kind else array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GGUF_NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"},
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"mlp.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")},
}


def tiny_settings(model: Path | str, **changes: Any) -> TeamSettings:
    """Settings for a tiny model on this machine's processor: a few short windows of pydoc, one behind the other."""
    return TeamSettings.model_validate(
        {
            **{"model": str(model), "device": "cpu", "window": 64, "calibration_windows": 4, "gradient_windows": 2},
            **{"validation_windows": 3, "test_windows": 2, "text_spread": 1},
            **changes,
        }
    )
