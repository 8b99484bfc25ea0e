"""Every decoder that transformers builds from a config, tiny, through the workbench: `python -m tests.architectures`

Writes the table of tools/models/README.md; with names of architectures, their rows alone are made anew. Each model is
built with random weights, saved, loaded, profiled, pruned to half by the two-sided mask, validated, exported and loaded
again by stock transformers. Masks must be exact to the weight, and the export's logits those of the model in the
workbench, bit for bit. Takes a few minutes on one core.
"""

import argparse
import re
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.benches import MASK
from tests.tiny import VOCABULARY, make_tiny_tokenizer, tiny_settings
from tools.base.errors import UserError, in_one_line
from tools.base.progress import ignore_progress as ignore
from tools.models.layers import LEAST_SHARE
from tools.models.save import export_model
from tools.plans.allocate import allocate
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench, use_workbench

PAGE = Path(__file__).resolve().parents[1] / "tools" / "models" / "README.md"
SECONDS = 120
"""An architecture that takes longer is given up."""
LARGEST = 8_000_000
"""Weights of a tiny model, at most: a config that is not made tiny by what is written below is not built."""

DOZEN = (
    *("gpt2", "gpt_neox", "bloom", "phi3", "cohere", "mamba", "bamba", "gemma3n_text", "deepseek_v32", "mixtral"),
    *("whisper", "hrm_text"),
)
"""What the suite tries, of as many kinds as there are."""

SPARSITY = 0.5

_BEGIN = "<!-- python -m tests.architectures -->"
"""What stands below it in the page is made by this file."""

# Fields of configs, by whatever name they have, and what makes a model of them tiny.
_WIDTH, _HEADS, _BLOCKS, _TOKENS = 32, 4, 2, 256
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("embedding_size", "kv_channels", "attention_hidden_size"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _BLOCKS),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), _BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), _HEADS),
    **{"num_key_value_heads": 2, "swa_num_key_value_heads": 2},
    **dict.fromkeys(("head_dim", "swa_head_dim", "rotary_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_topk", "sliding_window"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), _TOKENS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "index_n_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_state", "state_size", "chunk_size", "mamba_chunk_size"), 8),
    **{"n_group": 1, "topk_group": 1, "mamba_d_head": 8, "mamba_headdim": 8, "n_mamba_heads": 2},
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "is_decoder": True},
}
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
"""Lists of the kinds of blocks: a tiny model has one of each."""

_SHARING: dict[str, Any] = {
    **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
}
_BLT = {"hidden_size_global": 64, "num_key_value_heads": 4, "cross_attn_k": 2}
_DOTS: dict[str, Any] = {
    **{
        "layer_types": ["indexed_attention", "sliding_attention"],
        "head_dim": 16,
        "shared_experts_intermediate_size": 16,
    },
    "per_layer_config": {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
    },
}
_QWEN4: dict[str, Any] = {
    **{"ngram_vocab_size_base": 64, "split_ngram_parts": 1, "hc_lowrank": 8, "ple_embed_dim": 32},
    **{"indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1},
    "indexer_head_dim": 8,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "blt": {
        **{"encoder_hash_byte_group_vocab": 64, "encoder_config": _BLT, "decoder_config": _BLT},
        "global_config": {"hidden_size": 64, "num_key_value_heads": 4, "head_dim": 16},
        "patcher_config": {"num_key_value_heads": 4},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4},
    },
    "dory": {
        **{"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": _DOTS,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": _SHARING | {"laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4": {"text_config": _SHARING},
    "gemma4_text": _SHARING,
    "git": {"vision_config": {"num_hidden_layers": 1}},
    "got_ocr2": {"vision_config": {"num_hidden_layers": 1, "mlp_dim": 32, "output_channels": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY, "n_layers_per_attn_res_block": 1},
    "inkling2_loop_text": {
        **{"num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "unpadded_vocab_size": VOCABULARY},
        **{"loop_layer_index_start": 1, "loop_layer_index_end": 3, "n_layers_per_attn_res_block": 1},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "phi4_multimodal": {"audio_config": {"num_blocks": 1}, "vision_config": {"num_hidden_layers": 1}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8},
    "roc_bert": {
        **{"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
        **{"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
        **{"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_dt_rank": 4},
    },
    "zamba2": {
        **{"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
        **{"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
        **{"mamba_headdim": 32, "adapter_rank": 8, "hybrid_layer_ids": [1, 2]},
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What else an architecture needs to be tiny, or to be built at all."""


class Row(NamedTuple):
    """What became of one architecture."""

    name: str
    model: str
    """The class of the model; "" where it could not be built."""
    result: str
    """One of OUTCOMES, and more of it."""


OUTCOMES = {
    "works": "work",
    "works with --partial": "work with `--partial`, for less than half of their blocks' weights can be pruned",
    "refused": "are refused in one line",
    "not built": "cannot be built of a config and tokens alone",
    "raw": "end in an error that nobody meant to be read",
}


def make_config(name: str) -> Any:
    """The config of a tiny decoder."""
    values = CONFIG_MAPPING[name]().to_dict()
    return transformers.AutoConfig.for_model(name, **_merge(_shrink(values), OVERRIDES.get(name, {})))


def _shrink(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config, and of configs in it, that make it tiny."""
    tiny = {key: TINY[key] for key in values if key in TINY}
    kinds = {key: list(dict.fromkeys(values[key])) for key in KINDS if isinstance(values.get(key), list)}
    if kinds:
        count = max(_BLOCKS, *map(len, kinds.values()))
        tiny["num_hidden_layers"] = count
        tiny |= {key: (some + some[-1:] * count)[:count] for key, some in kinds.items()}
    if "kv_lora_rank" in values:
        tiny["num_key_value_heads"] = _HEADS
    parts = {key: value for key, value in values.items() if isinstance(value, dict) and "model_type" in value}
    return tiny | {key: _shrink(value) | {"model_type": value["model_type"]} for key, value in parts.items()}


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return values | {k: _merge(values[k], v) if isinstance(values.get(k), dict) else v for k, v in changes.items()}


def build_model(name: str) -> Any:
    """A tiny decoder with random weights. Raises whatever transformers raises, and ValueError for one too large."""
    config = make_config(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} weights are too many")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def try_architecture(name: str, directory: Path) -> Row:
    """Build it in an empty directory, and take it through the workbench."""
    model = ""
    with _time_limit():
        try:
            built = build_model(name)
            model = type(built).__name__
            built(input_ids=torch.arange(16)[None], use_cache=False)
            built.save_pretrained(directory / "model")
        except Exception as error:
            return Row(name, model, f"not built: {type(error).__name__}: {in_one_line(error, 100)}")
        make_tiny_tokenizer().save_pretrained(directory / "model")
        del built
        try:
            return Row(name, model, _prune(directory))
        except UserError as error:
            return Row(name, model, f"refused: {str(error).replace(str(directory / 'model'), name)}")
        except Exception as error:
            traceback.print_exc()
            return Row(name, model, f"raw: {type(error).__name__}: {in_one_line(error, 100)}")
        finally:
            close_workbench()


def _prune(directory: Path) -> str:
    warned: list[str] = []
    settings = tiny_settings(directory / "model", calibration_windows=2, validation_windows=2, window=32, partial=True)
    with use_workbench(settings, directory / "run", warned.append, ignore) as bench:
        profile = bench.profile(ignore)
        allocation = allocate(bench.profiles.read(profile).layers, SPARSITY, MASK, (), max_layer_sparsity=0.9)
        checkpoint = bench.pruner.prune(profile, order_allocation(MASK, allocation), ignore)
        zeros, weights = bench.weights.count_zeros()
        assert zeros == round(SPARSITY * weights), f"{zeros} zeros of {weights} weights"
        for layer in bench.weights.layers:
            assert int((layer.weight_OI == 0).sum()) == allocation.zeros[layer.name], layer.name
        evaluation = bench.evaluator.evaluate(checkpoint, "validation", profile, ignore)
        export_model(bench.model, bench.tokenizer, directory / "export", "")
        _compare_export(bench, directory / "export")
        assert evaluation.finite, "losses are not finite"
        how = "works" if bench.reach.of_blocks >= LEAST_SHARE else "works with --partial"
        return f"{how}: {len(bench.weights.layers)} layers, {bench.reach.of_blocks:.0%} of the blocks' weights"


def _compare_export(bench: Workbench, directory: Path) -> None:
    stock, loading = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], f"keys of the export: {loading}"
    ids_BT = bench.windows.validation[:1]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids_BT, use_cache=False).logits for model in (bench.model, stock.eval()))
    assert torch.equal(ours, theirs), "the export has other logits"


@contextmanager
def _time_limit() -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise TimeoutError(f"not done in {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_rows(page: str) -> list[Row]:
    """The rows of the table."""
    return [Row(*cells) for cells in re.findall(r"^\| `(\S+)` \| `?(.*?)`? \| (.*) \|$", page, re.MULTILINE)]


def write_rows(page: str, rows: Iterable[Row]) -> str:
    """The page with these rows in the place of others of their names, and with its sentence of how many there are."""
    known = {row.name: row for row in [*read_rows(page), *rows]}
    lines = [f"| `{x.name}` | {x.model and f'`{x.model}`'} | {x.result} |" for _, x in sorted(known.items())]
    counts = Counter(row.result.partition(":")[0] for row in known.values())
    told = ", ".join(f"{counts[outcome]} {words}" for outcome, words in OUTCOMES.items())
    sentence = f"Of the {len(known)} that transformers {transformers.__version__} has, {told}."
    table = "\n".join(["| architecture | model | |", "|---|---|---|", *lines])
    return page[: page.index(_BEGIN)] + f"{_BEGIN}\n\n{sentence}\n\n{table}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Architectures, as configs call them; default: all.")
    transformers.utils.logging.set_verbosity_error()
    for name in parser.parse_args().names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with tempfile.TemporaryDirectory() as directory:
            row = try_architecture(name, Path(directory))
        print(f"{row.name}: {row.result}", flush=True)
        PAGE.write_text(write_rows(PAGE.read_text(encoding="utf-8"), [row]), encoding="utf-8")


if __name__ == "__main__":
    main()
