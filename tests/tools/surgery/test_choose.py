"""What goes: how much of it, and the heads and neurons that nothing reads; and the refit of what stays."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.cuts import (
    IDS,
    assert_same_logits,
    find_damping_slowly,
    fit_slowly,
    make_config,
    make_cut,
    make_model,
    read_inputs,
)
from tests.tiny import ARCHITECTURES, make_tiny_model
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.measure.losses import evaluate_windows
from tools.plans.cuts import Counts
from tools.surgery.choose import choose_channels, choose_cut, list_counts, measure_kl
from tools.surgery.parts import find_parts, without_fits
from tools.surgery.rebuild import build_cut, check_buildable

PAIR = ("neurons", "heads")


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
    cut = choose_channels(dense, [Counts(heads=1)], IDS, ignore_progress)[0]
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
        share = find_damping_slowly(x, target, weight, kept, biased=bias is not None)
        damping = share * float((spread**2).mean())
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


def test_a_token_before_the_text_counts_in_no_kl() -> None:
    dense, other = make_tiny_model("llama"), make_tiny_model("llama", seed=1)
    _, hidden = evaluate_windows(dense, IDS, None, "", ignore_progress, lead=1)
    expected = evaluate_windows(other, IDS, hidden, "", ignore_progress, lead=1)[0].mean_kl
    assert measure_kl(dense, other, IDS, lead=1) == pytest.approx(expected, rel=1e-6)
    blocks, parts = (choose_cut(dense, kinds, 0.3, IDS, ignore_progress, lead=1) for kinds in (("blocks",), PAIR))
    assert (blocks.tokens, parts.tokens) == (2 * 4 * 47, 2 * 4 * 47), "two tries on the text of four windows"
