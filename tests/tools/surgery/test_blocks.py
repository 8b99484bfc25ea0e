"""Whole blocks are cut: those that do nothing first, and the block before takes over what one added."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from billhook_kernels.channels import expand_units
from tests.cuts import (
    IDS,
    assert_same_logits,
    compute_logits,
    cut_blocks,
    find_damping_slowly,
    fit_slowly,
    make_config,
    make_model,
    read_inputs,
)
from tests.tiny import ARCHITECTURES, make_tiny_model
from tools.base.progress import ignore_progress
from tools.models.blocks import Blocks
from tools.models.layers import find_blocks
from tools.surgery.blocks import choose_blocks, fold_blocks, pass_on_without_weights
from tools.surgery.choose import measure_kl
from tools.surgery.parts import KINDS, Fit, find_parts, without_fits
from tools.surgery.rebuild import build_cut


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
    order, _ = choose_blocks(dense, 2, IDS, ignore_progress)
    assert sorted(order) == [1, 2]
    cut = cut_blocks(dense, order)
    model = build_cut(dense, without_fits(cut))
    assert_same_logits(model, dense)
    assert_same_logits(build_cut(dense, cut), dense)
    assert model.config.num_hidden_layers == 2
    if "layer_types" in options:
        assert model.config.layer_types == [options["layer_types"][i] for i in (0, 3)]


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
    share = find_damping_slowly(x, target, weight, np.arange(x.shape[1]), biased=bias is not None)
    damping = share * float(((x if bias is None else x - x.mean(0)) ** 2).mean())
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


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3"])
def test_what_stays_is_fitted_behind_the_blocks_that_were_cut_below(architecture: str) -> None:
    """To what the dense model passes on, where the MLP adds to it; in Gemma 3 a norm comes after."""
    dense, kept = make_tiny_model(architecture), {"heads": [0], "neurons": [*range(0, 48, 2)]}
    stays = [(part, torch.tensor(kept[kind])) for kind in KINDS for part in find_parts(dense, kind)]
    fits = {(fit.part.block, fit.part.kind): fit for fit in fold_blocks(dense, [], IDS, ignore_progress, stays)}
    assert len(fits) == len(stays)
    below = copy.deepcopy(dense)
    for kind in KINDS:
        write_fit(below, fits[0, kind])
    for kind in KINDS:
        lacking = read_outputs(dense, 1) - read_outputs(below, 1)
        assert np.abs(lacking).max() > 1e-3
        fit, part = fits[1, kind], find_parts(below, kind)[1]
        x, weight = read_inputs(below, part.output.module), part.output.weight_OI.double().numpy()
        bias = None if part.bias is None else part.bias.double().numpy()
        target = x @ weight.T + (0 if bias is None else bias)
        if kind == "neurons" and architecture != "gemma3":
            target = target + lacking
        each = weight.shape[1] // part.units
        channels = (np.array(kept[kind])[:, None] * each + np.arange(each)).reshape(-1)
        share = find_damping_slowly(x, target, weight, channels, biased=bias is not None)
        damping = share * float(((x if bias is None else x - x.mean(0)) ** 2).mean())
        slow = fit_slowly(x[:, channels], target, weight[:, channels], damping, biased=bias is not None)
        assert fit.weight_OK is not None
        np.testing.assert_allclose(fit.weight_OK.double().numpy(), slow[:, : len(channels)], rtol=2e-3, atol=2e-3)
        write_fit(below, fit)  # neurons are fitted behind the block's own heads


def write_fit(model: Any, fit: Fit) -> None:
    """Put a fit into the model, in its own shapes: what goes reads nothing."""
    part = find_parts(model, fit.part.kind)[fit.part.block]
    assert fit.weight_OK is not None
    weight_OI = torch.zeros_like(part.output.weight_OI)
    weight_OI[:, expand_units(fit.units, weight_OI.shape[1] // part.units)] = fit.weight_OK
    part.output.write(weight_OI)
    if fit.bias_O is not None:
        part.output.module.bias.data.copy_(fit.bias_O)


def test_nothing_is_folded_where_it_cannot_be() -> None:
    assert not list(fold_blocks(make_tiny_model("gemma3"), [1], IDS, ignore_progress))  # a norm comes after the MLP
    assert not list(fold_blocks(make_tiny_model("qwen3_moe"), [1], IDS, ignore_progress))  # there is no one MLP
    assert not list(fold_blocks(make_tiny_model("llama"), [0], IDS, ignore_progress))  # nothing comes before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_without_weights_passes_on_what_it_reads(architecture: str) -> None:
    assert pass_on_without_weights(Blocks(make_tiny_model(architecture)), IDS[0])


def test_a_norm_behind_the_sum_does_not_let_it() -> None:
    """As in OPT-350M: a block of zeros is another model than one without it."""
    model = make_model(make_config("opt", do_layer_norm_before=False))
    before = compute_logits(model)
    assert not pass_on_without_weights(Blocks(model), IDS[0])
    assert torch.equal(compute_logits(model), before), "no hook is left"


def test_attention_that_is_scaled_by_the_number_of_its_block_does_not_let_it() -> None:
    model = make_model(make_config("gpt2", scale_attn_by_inverse_layer_idx=True))
    assert not pass_on_without_weights(Blocks(model), IDS[0])
