"""Whole heads, neurons and blocks are cut: what stays computes what it did, and loads as a stock model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from kernels.refit import DAMPING
from tests.tiny import (
    ARCHITECTURES,
    VOCABULARY,
    make_tiny_config,
    make_tiny_model,
    make_tiny_tokenizer,
    save_tiny_model,
)
from tools.base.errors import UserError
from tools.export import export_model
from tools.measure.losses import evaluate_windows
from tools.models.layers import find_blocks, find_layers
from tools.structure import main
from tools.surgery.choose import check_cut, choose_blocks, choose_channels, fold_blocks, measure_kl
from tools.surgery.cut import (
    Counts,
    Cut,
    Fit,
    build_cut,
    check_buildable,
    count_weights,
    find_parts,
    list_counts,
    without_fits,
)

GROUPED = ("llama", "qwen3", "gemma3", "qwen3_moe")
"""Architectures whose heads can be cut."""
IDS = torch.randint(VOCABULARY, (4, 48), generator=torch.Generator().manual_seed(0))
COUNTS = {"neurons": Counts(neurons=12), "heads": Counts(heads=1), "both": Counts(heads=1, neurons=12)}


def quiet(*_: Any) -> None:
    """No progress."""


def compute_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def assert_same_logits(model: Any, dense: Any) -> None:
    """Up to the order of sums."""
    torch.testing.assert_close(compute_logits(model), compute_logits(dense), rtol=1e-4, atol=1e-4)


def cut_blocks(model: Any, dropped: list[int]) -> Cut:
    return Cut(Counts(blocks=len(dropped)), fold_blocks(model, dropped, IDS, quiet), tuple(dropped))


def make_cut(model: Any, parts: str) -> Cut:
    if parts == "blocks":
        return cut_blocks(model, choose_blocks(model, 1, IDS, quiet)[0])
    return choose_channels(model, [COUNTS[parts]], IDS, quiet)[0]


def make_config(architecture: str, **options: Any) -> Any:
    """The tiny config with some fields changed; of an architecture that it does not know, with Llama's sizes."""
    if architecture in ARCHITECTURES:
        config = make_tiny_config(architecture)
        for name, value in options.items():
            setattr(config, name, value)
        return config
    sizes = make_tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
    return transformers.AutoConfig.for_model(architecture, **{name: sizes[name] for name in names}, **options)


def make_model(config: Any) -> Any:
    """A model with seeded random weights; its biases are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    return model.eval().requires_grad_(False)


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


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((architecture, {"attention_bias": bias}) for architecture in ("llama", "qwen3") for bias in (False, True)),
        ("gemma3", {}),
        ("mistral", {}),
        ("qwen2", {}),  # q, k and v have biases
    ],
)
def test_groups_that_nothing_reads_go_first_and_change_nothing(architecture: str, options: dict[str, Any]) -> None:
    dense = make_model(make_config(architecture, **options))
    for block, part in enumerate(find_parts(dense, "heads")):
        weight = part.output.weight_OI.clone()
        weight[:, 16 * (block % 2) :][:, :16] = 0
        part.output.write(weight)
    cut = choose_channels(dense, [Counts(heads=1)], IDS, quiet)[0]
    assert [fit.units.tolist() for fit in cut.fits] == [[1], [0]]
    assert_same_logits(build_cut(dense, without_fits(cut)), dense)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neurons_that_nothing_reads_go_first_and_change_nothing(architecture: str) -> None:
    dense = make_tiny_model(architecture)
    for part in find_parts(dense, "neurons"):
        weight = part.output.weight_OI.clone()
        weight[:, part.block :: 4] = 0
        part.output.write(weight)
    cut = make_cut(dense, "neurons")
    for fit in cut.fits:
        assert fit.units.tolist() == [unit for unit in range(48) if unit % 4 != fit.part.block]
    assert_same_logits(build_cut(dense, without_fits(cut)), dense)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_that_do_nothing_go_first_and_change_nothing(architecture: str) -> None:
    options: dict[str, Any] = {"num_hidden_layers": 4}
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    if architecture in ("qwen3", "gemma3"):
        options["layer_types"] = types if architecture == "gemma3" else types[1::2] * 2
    dense = make_model(make_config(architecture, **options))
    for block in (1, 2):
        for tensor in find_blocks(dense)[block].parameters():
            tensor.zero_()
    order, _ = choose_blocks(dense, 2, IDS, quiet)
    assert sorted(order) == [1, 2]
    cut = cut_blocks(dense, order)
    model = build_cut(dense, without_fits(cut))
    assert_same_logits(model, dense)
    assert_same_logits(build_cut(dense, cut), dense)
    assert model.config.num_hidden_layers == 2
    if "layer_types" in options:
        assert model.config.layer_types == [options["layer_types"][i] for i in (0, 3)]


def read_inputs(model: Any, module: Any) -> np.ndarray[Any, Any]:
    """What a module reads in one forward of the whole model, float64."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, -2)))
    compute_logits(model)
    hook.remove()
    return seen[0].double().numpy()


def fit_slowly(x: Any, target: Any, towards: Any, damping: float, *, biased: bool) -> Any:
    """Least squares over the tokens, with a row for each damped weight; the intercept last, where there is one."""
    rows = np.concatenate([x, np.sqrt(len(x) * damping) * np.eye(x.shape[1])])
    if biased:
        rows = np.concatenate([rows, np.r_[np.ones(len(x)), np.zeros(x.shape[1])][:, None]], axis=1)
    extended = np.concatenate([target, np.sqrt(len(x) * damping) * towards.T])
    return np.linalg.lstsq(rows, extended, rcond=None)[0].T


@pytest.mark.parametrize(
    ("architecture", "parts"), [("llama", "neurons"), ("qwen3", "heads"), ("gpt2", "neurons"), ("opt", "neurons")]
)
def test_the_refit_is_damped_least_squares_and_lowers_the_error(architecture: str, parts: str) -> None:
    dense = make_tiny_model(architecture)
    for fit in make_cut(dense, parts).fits:
        part, width = fit.part, fit.part.output.weight_OI.shape[1] // fit.part.units
        kept = (fit.units[:, None] * width + torch.arange(width)).flatten().numpy()
        x, weight = read_inputs(dense, part.output.module), part.output.weight_OI.double().numpy()
        bias = None if part.bias is None else part.bias.double().numpy()
        target = x @ weight.T + (0 if bias is None else bias)
        spread = x if bias is None else x - x.mean(0)
        damping = DAMPING * float((spread**2).mean())
        slow = fit_slowly(x[:, kept], target, weight[:, kept], damping, biased=bias is not None)
        assert fit.weight_OK is not None
        np.testing.assert_allclose(fit.weight_OK.double().numpy(), slow[:, : len(kept)], rtol=1e-3, atol=1e-4)
        fitted = x[:, kept] @ fit.weight_OK.double().numpy().T
        plain = x[:, kept] @ weight[:, kept].T
        if bias is None:
            assert fit.bias_O is None
        else:  # and the bias takes what the means of the cut channels gave
            assert fit.bias_O is not None
            np.testing.assert_allclose(fit.bias_O.numpy(), slow[:, -1], rtol=1e-3, atol=1e-4)
            fitted, plain = fitted + fit.bias_O.double().numpy(), plain + bias
            np.testing.assert_allclose(fitted.mean(0), target.mean(0), atol=1e-5)
        assert ((fitted - target) ** 2).sum() < 0.9 * ((plain - target) ** 2).sum()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
def test_the_block_before_takes_over_what_a_dropped_block_added(architecture: str) -> None:
    dense = make_tiny_model(architecture)
    cut = cut_blocks(dense, [1])
    (fit,) = cut.fits
    assert fit.part.block == 0 and fit.weight_OK is not None
    x, weight = read_inputs(dense, fit.part.output.module), fit.part.output.weight_OI.double().numpy()
    added = read_outputs(dense, 1) - read_outputs(dense, 0)
    bias = None if fit.part.bias is None else fit.part.bias.double().numpy()
    target = x @ weight.T + added + (0 if bias is None else bias)
    damping = DAMPING * float(((x if bias is None else x - x.mean(0)) ** 2).mean())
    slow = fit_slowly(x, target, weight, damping, biased=bias is not None)
    np.testing.assert_allclose(fit.weight_OK.double().numpy(), slow[:, : x.shape[1]], rtol=1e-3, atol=1e-3)
    if bias is not None:
        assert fit.bias_O is not None
        np.testing.assert_allclose(fit.bias_O.numpy(), slow[:, -1], rtol=1e-3, atol=1e-3)
    kl = [measure_kl(dense, build_cut(dense, each), IDS) for each in (without_fits(cut), cut)]
    assert kl[1] < 0.7 * kl[0]


def read_outputs(model: Any, block: int) -> Any:
    """What a block gives in one forward of the whole model, float64."""
    seen: list[Tensor] = []
    hook = find_blocks(model)[block].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    compute_logits(model)
    hook.remove()
    return seen[0].flatten(0, -2).double().numpy()


def test_nothing_is_folded_where_it_cannot_be() -> None:
    assert fold_blocks(make_tiny_model("gemma3"), [1], IDS, quiet) == []  # a norm comes after the MLP
    assert fold_blocks(make_tiny_model("qwen3_moe"), [1], IDS, quiet) == []  # there is no one MLP
    assert fold_blocks(make_tiny_model("llama"), [0], IDS, quiet) == []  # nothing comes before


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


@pytest.mark.parametrize(
    ("kinds", "remove", "counts"),
    [
        (("neurons",), 0.2, [Counts(neurons=16)]),  # 7,680 weights a block, 96 a neuron, 8 neurons at a time
        (("neurons",), 0.16, [Counts(neurons=16)]),
        (("heads",), 0.2, [Counts(heads=1)]),  # 1,536 a group
        (("neurons", "heads"), 0.2, [Counts(neurons=16), Counts(heads=1)]),
        (("neurons", "heads"), 0.3, [Counts(neurons=24), Counts(heads=1, neurons=8)]),
        (("neurons", "heads"), 0.7, [Counts(heads=1, neurons=40)]),
        (("blocks",), 0.3, [Counts(blocks=1)]),
    ],
)
def test_as_much_goes_as_whole_units_allow(kinds: tuple[str, ...], remove: float, counts: list[Counts]) -> None:
    assert list_counts(make_tiny_model("llama"), kinds, remove) == counts


def test_numbers_of_heads_that_the_config_refuses_are_left_out() -> None:
    dense = make_model(make_config("llama", num_key_value_heads=4))  # 32 is no multiple of 3 heads
    assert list_counts(dense, ["heads"], 0.15) == [Counts(heads=2)]
    assert list_counts(dense, ["neurons", "heads"], 0.25) == [Counts(neurons=24), Counts(heads=2)]
    one = make_model(make_config("llama", num_key_value_heads=1))
    with pytest.raises(UserError, match=r"^0.1 is too much to remove: 0.00% is the most that can go here$"):
        list_counts(one, ["heads"], 0.1)
    with pytest.raises(UserError, match=r"^LlamaForCausalLM takes no such cut: .* not a multiple of"):
        check_buildable(dense, Counts(heads=1))


@pytest.mark.parametrize(
    ("architecture", "flags", "message"),
    [
        ("llama", "--remove 1", "remove: input should be less than 1, not '1'"),
        ("llama", "--remove 0", "remove: input should be greater than 0, not '0'"),
        ("llama", "--parts legs", "--parts 'legs' is none of neurons; heads; neurons,heads; blocks"),
        ("llama", "--parts blocks,heads", "--parts 'blocks,heads' is none of neurons; heads; neurons,heads; blocks"),
        ("llama", "--remove 0.99", "0.99 is too much to remove: 70.00% is the most that can go here"),
        ("llama", "--remove 0.001", "0.001 is too little to remove: 10.00% is the least that can go here"),
        ("llama", "--parts heads --remove 0.5", "0.5 is too much to remove: 20.00% is the most that can go here"),
        ("llama", "--parts neurons --remove 0.7", "0.7 is too much to remove: 50.00% is the most that can go here"),
        ("opt", "--parts neurons --remove 0.03", "0.03 is too little to remove: 7.14% is the least that can go here"),
        ("llama", "--parts blocks --remove 0.75", "0.75 is too much to remove: 50.00% is the most that can go here"),
        ("llama", "--parts blocks --remove 0.1", "0.1 is too little to remove: 50.00% is the least that can go here"),
        (
            "gpt2",
            "--parts heads",
            "the heads of GPT2LMHeadModel cannot be cut: its attention holds attn.c_attn, attn.c_proj, not q_proj, "
            "k_proj, v_proj and one output projection; its neurons or blocks may",
        ),
        (
            "opt",
            "--parts heads",
            "OPTForCausalLM takes no such cut: embed_dim must be divisible by num_heads (got `embed_dim`: 32 and "
            "`num_heads`: 3).",
        ),
        (
            "opt",
            "--parts heads --remove 0.3",
            "OPTForCausalLM takes no such cut: its config has no way to say that "
            "model.decoder.layers.0.self_attn.k_proj.bias is (16,), not (32,); other parts may be cut",
        ),
        (
            "qwen3_moe",
            "--parts neurons",
            "the neurons of Qwen3MoeForCausalLM cannot be cut: beside attention its blocks hold no linear layers, not "
            "projections up and one down; its heads or blocks may",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    architecture: str, flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny_model(tmp_path / "dense", architecture)
    assert main(["--out", str(tmp_path / "cut"), *describe(source), *flags.split()]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "cut").exists()


def describe(source: Path) -> list[str]:
    """Flags of a small run."""
    sizes = "--window 64 --calibration-windows 4 --validation-windows 3 --test-windows 2 --device cpu"
    return ["--model", str(source), *sizes.split()]


def test_blocks_that_differ_are_refused() -> None:
    dense = make_tiny_model("llama")
    find_blocks(dense)[1].mlp = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"^the blocks of LlamaForCausalLM are not all alike; only models whose"):
        list_counts(dense, ["blocks"], 0.5)


@pytest.mark.parametrize("parts", ["neurons,heads", "blocks"])
def test_the_command_writes_a_smaller_model_and_its_figures(
    parts: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "cut"), *describe(tiny_llama), "--parts", parts, "--remove", "0.4"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "cut" / "structure.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "model")
    assert figures["cut"]["parameters"] == loaded.num_parameters() < figures["dense"]["parameters"] == 25_760
    file = tmp_path / "cut" / "model" / "model.safetensors"
    assert figures["cut"]["file_bytes"] == file.stat().st_size < (tiny_llama / "model.safetensors").stat().st_size
    achieved = 1 - count_weights(loaded) / (2 * 7680)
    assert figures["removed"] == pytest.approx(achieved) == pytest.approx(0.4 if parts != "blocks" else 0.5)
    assert figures["kl"] < figures["kl_without_refit"]
    assert all(figures[model][speed] > 0 for model in ("dense", "cut") for speed in SPEEDS)
    if parts == "blocks":
        assert (figures["heads"], figures["neurons"], len(figures["blocks"])) == (0, 0, 1)
        assert figures["constraint"].startswith("whole blocks, in this order, each the one without which KL was lowest")
    else:
        assert figures["blocks"] == []
        widths = f"{figures['heads']} of 2 groups of heads and {figures['neurons']} of 48 neurons"
        assert figures["constraint"].startswith(f"every block loses the same number, its own lowest-scored: {widths}")
    for words in (f"{figures['dense']['perplexity']:.2f}", f"{figures['cut']['perplexity']:.2f}", "cut and refitted"):
        assert words in printed and words in (tmp_path / "cut" / "model" / "README.md").read_text()
    assert f"{figures['removed']:.2%} removed (asked for 40.00%); " in printed
    assert main(flags) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'cut' / 'model'} exists already; choose another --out\n"


SPEEDS = ("seconds_per_window", "decoded_per_second")


def test_the_figures_are_those_of_the_written_model(tiny_llama: Path, tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "cut"), *describe(tiny_llama), "--parts", "neurons"]) == 0
    figures = json.loads((tmp_path / "cut" / "structure.json").read_text())
    from tests.tiny import tiny_settings
    from tools.texts.windows import cut_windows

    settings = tiny_settings(tiny_llama, window=64)
    windows = cut_windows(settings, make_tiny_tokenizer()).validation
    for source, name in ((tiny_llama, "dense"), (tmp_path / "cut" / "model", "cut")):
        model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
        evaluation, _ = evaluate_windows(model, windows, None, "", quiet)
        assert figures[name]["perplexity"] == pytest.approx(evaluation.perplexity, rel=1e-5)
