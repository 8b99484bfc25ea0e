"""The profile against plain autograd and explicit sums, in float64."""

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from billhook_kernels.masks import score_two_sided
from billhook_kernels.methods import LayerStatistics
from billhook_kernels.statistics import lean_to_mean
from tests.tiny import ARCHITECTURES, BLOCKS, VOCABULARY, make_tiny_model
from tools.base.errors import UserError
from tools.base.progress import ignore_progress as ignore
from tools.models.blocks import Blocks
from tools.models.layers import Layer, find_layers
from tools.models.readout import compute_hidden, compute_logits
from tools.plans.layer_profile import LEVELS
from tools.statistics.collect import Progress, collect_moments, collect_statistics, measure_kappa
from tools.statistics.gradients import CLIP
from tools.statistics.known import PRIOR, ModelStatistics
from tools.statistics.passage import Walk
from tools.statistics.requests import Here, work_alone

SCRATCH = Path(tempfile.gettempdir())
WINDOWS, LENGTH, BACKWARD, SEED = 3, 20, 2, 5


def make_windows() -> Tensor:
    return torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))


class Collected(NamedTuple):
    """What `collect_statistics` gives and hands over."""

    statistics: ModelStatistics
    moments: dict[str, Tensor]

    def of(self, name: str) -> LayerStatistics:
        means = self.statistics.mean_square[name], self.statistics.gradient_square[name]
        return LayerStatistics(*means, self.moments[self.statistics.group[name]])


def collect(
    model: Any,
    layers: list[Layer],
    windows: Tensor | None = None,
    backward: int = BACKWARD,
    seed: int = SEED,
    progress: Progress = ignore,
) -> Collected:
    windows, moments = make_windows() if windows is None else windows, dict[str, Tensor]()
    team, extent = work_alone(Blocks(model), layers, windows, backward, seed, SCRATCH)
    statistics = collect_statistics(team, extent, layers, progress, moments.__setitem__)
    return Collected(statistics, moments)


@contextmanager
def watch(layers: list[Layer]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inputs and outputs of every layer of one forward, by name; outputs keep their gradients."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach().flatten(0, -2), output
            output.retain_grad()

        return hook

    hooks = [layer.module.register_forward_hook(see(layer.name)) for layer in layers]
    yield inputs, outputs
    for hook in hooks:
        hook.remove()


def draw_labels(model: Any, ids_T: Tensor, window: int) -> Tensor:
    """The labels that the profile draws, every window with its own generator; one chunk is enough here."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + window)
    with torch.no_grad():
        p = compute_logits(model, compute_hidden(model, ids_T[None])[0]).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def plain_gradients(model: Any, window: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(x, g) of every layer in float64 for one window, g = d(sum of -log p(drawn label)) / d(output)."""
    ids = make_windows()[window]
    labels = draw_labels(model, ids, window)
    double = copy.deepcopy(model).double().requires_grad_(True)
    with watch(find_layers(double)) as (inputs, outputs):
        logits = double(input_ids=ids[None], use_cache=False).logits[0]
        F.cross_entropy(logits, labels, reduction="sum").backward()
    gradients = {}
    for name, output in outputs.items():
        assert output.grad is not None
        gradients[name] = output.grad.flatten(0, -2)
    return inputs, gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moments_are_explicit_means_over_all_windows(architecture: str) -> None:
    model = make_tiny_model(architecture)
    layers = find_layers(model)
    collected = collect(model, layers)
    total: dict[str, Tensor] = {}
    double = copy.deepcopy(model).double().requires_grad_(True)
    for ids in make_windows():
        with watch(find_layers(double)) as (inputs, _):
            double(input_ids=ids[None], use_cache=False)
        for name, x in inputs.items():
            total[name] = total.get(name, torch.zeros(())) + x.T @ x / (WINDOWS * LENGTH)
    for layer in layers:
        of = collected.of(layer.name)
        assert of.second_moment_II is not None and of.second_moment_II.dtype == torch.float32
        expected = total[layer.name]
        torch.testing.assert_close(of.second_moment_II.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        torch.testing.assert_close(of.mean_square_I, of.second_moment_II.diagonal())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma4"])
def test_gamma_and_gradient_score_equal_plain_autograd(architecture: str) -> None:
    model = make_tiny_model(architecture)
    layers = find_layers(model)
    statistics = collect(model, layers).statistics
    gamma: dict[str, Tensor] = {}
    for window in range(BACKWARD):
        for name, g in plain_gradients(model, window)[1].items():
            gamma[name] = gamma.get(name, torch.zeros(())) + g.square().sum(0) / (BACKWARD * LENGTH)
    score = dict.fromkeys(gamma, 0.0)
    double = copy.deepcopy(model).double().requires_grad_(True)
    for ids in make_windows()[:BACKWARD]:
        double.zero_grad()
        logits = double(input_ids=ids[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], ids[1:]).backward()
        for layer in find_layers(double):
            gradient = layer.module.get_parameter("weight").grad
            assert gradient is not None
            score[layer.name] += float(gradient.abs().mean()) / BACKWARD
    for layer in layers:
        measured = statistics.gradient_square[layer.name].double()
        expected = lean_to_mean(gamma[layer.name], BACKWARD * LENGTH, PRIOR)
        torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
        assert statistics.gradient[layer.name] == pytest.approx(score[layer.name], rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_kappa_is_the_explicit_sum_for_weights_that_are_really_removed(architecture: str) -> None:
    model = make_tiny_model(architecture)
    layers = find_layers(model)
    layers[1].write(torch.where(torch.rand(layers[1].weight_OI.shape) < 0.2, 0, layers[1].weight_OI))
    collected = collect(model, layers)
    kappa = collected.statistics.kappa
    expected = {layer.name: np.zeros(len(LEVELS)) for layer in layers}
    for window in range(BACKWARD):
        inputs, gradients = plain_gradients(model, window)
        for layer in layers:
            weight = layer.weight_OI.double()
            of = collected.of(layer.name)
            score = score_two_sided(layer.weight_OI, of.mean_square_I, of.gradient_square_O).flatten()
            order = torch.where(layer.weight_OI.flatten() == 0, -1, score).argsort(stable=True)
            for level, sparsity in enumerate(LEVELS):
                pruned = weight.flatten().clone()
                pruned[order[: round(sparsity * weight.numel())]] = 0
                change = weight - pruned.reshape(weight.shape)
                for x, g in zip(inputs[layer.name], gradients[layer.name], strict=True):
                    expected[layer.name][level] += float(g @ change @ x) ** 2
    for layer in layers:
        np.testing.assert_allclose(kappa[layer.name], expected[layer.name] / (2 * BACKWARD * LENGTH), rtol=2e-3)


@pytest.mark.parametrize(
    ("architecture", "sharing"),
    [
        ("llama", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
        ("qwen3", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
        ("gemma3", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
        ("opt", [("q_proj", "k_proj", "v_proj")]),
        ("gpt2", []),
    ],
)
def test_layers_that_read_the_same_input_share_a_moment(architecture: str, sharing: list[tuple[str, ...]]) -> None:
    model = make_tiny_model(architecture)
    layers = find_layers(model)
    statistics, moments = collect(model, layers)
    for block in range(2):
        groups: dict[str, set[str]] = {}
        for layer in layers:
            if layer.block == block:
                groups.setdefault(statistics.group[layer.name], set()).add(layer.kind.rsplit(".", 1)[-1])
        assert sorted(sorted(g) for g in groups.values() if len(g) > 1) == sorted(sorted(g) for g in sharing)
    assert set(moments) == set(statistics.group.values())


@pytest.mark.usefixtures("raw_gamma")
def test_labels_of_a_window_do_not_depend_on_the_others() -> None:
    model = make_tiny_model("llama")
    layers, windows = find_layers(model), make_windows()
    both, first = (collect(model, layers, windows[:n], n).statistics for n in (2, 1))
    changed = windows[:2].clone()
    changed[0] = 7
    other = collect(model, layers, changed, 2).statistics
    alone = collect(model, layers, changed[:1], 1).statistics
    for layer in layers:  # what the second window adds is the same whatever the first is
        name = layer.name
        second = 2 * both.gradient_square[name] - first.gradient_square[name]
        again = 2 * other.gradient_square[name] - alone.gradient_square[name]
        largest = float(torch.maximum(both.gradient_square[name], other.gradient_square[name]).max())
        torch.testing.assert_close(second, again, rtol=1e-3, atol=1e-5 * largest)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    model = make_tiny_model("llama")
    layers, windows = find_layers(model), make_windows()
    first, second = (collect(model, layers, windows, 2, 3).statistics for _ in range(2))
    third = collect(model, layers, windows, 2, 4).statistics
    name = layers[0].name
    assert torch.equal(first.gradient_square[name], second.gradient_square[name])
    assert not torch.equal(first.gradient_square[name], third.gradient_square[name])
    assert first.gradient == third.gradient  # the text's own labels


def test_the_model_is_left_as_it_was() -> None:
    model = make_tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = find_layers(model)
    collect(model, layers)
    parts = {layer.name: [0 * layer.weight_OI] * len(LEVELS) for layer in layers}
    team, extent = work_alone(Blocks(model), layers, make_windows()[:1], 1, SEED, SCRATCH)
    measure_kappa(team, extent, layers, ignore, lambda _: [Here(parts)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_fp32_statistics_near_the_fp32_ones(dtype: torch.dtype) -> None:
    model = make_tiny_model("llama")
    exact = collect(model, find_layers(model)).statistics
    half = model.to(dtype)
    layers = find_layers(half)
    rough = collect(half, layers)
    for layer in layers:
        of = rough.of(layer.name)
        assert of.second_moment_II is not None
        assert {of.mean_square_I.dtype, of.gradient_square_O.dtype, of.second_moment_II.dtype} == {torch.float32}
        assert rough.statistics.gradient[layer.name] == pytest.approx(exact.gradient[layer.name], rel=0.1)
        assert all(math.isfinite(k) and k > 0 for k in rough.statistics.kappa[layer.name])


def test_more_backward_windows_than_windows() -> None:
    model = make_tiny_model("llama")
    layers = find_layers(model)
    many = collect(model, layers, backward=10).statistics
    all_of_them = collect(model, layers, backward=WINDOWS).statistics
    assert many.gradient == all_of_them.gradient


def test_a_layer_that_never_runs_is_named() -> None:
    model = make_tiny_model("llama")
    layers = find_layers(model)
    stray = Layer("model.layers.1.expert", 1, "expert", torch.nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"layer model.layers.1.expert never ran on the calibration text"):
        collect(model, [*layers, stray])


def test_progress_counts_the_shards_of_every_block_up_and_down() -> None:
    model = make_tiny_model("llama")
    seen: list[tuple[str, int, int]] = []
    collect(model, find_layers(model), progress=lambda *step: seen.append(step))
    steps = [(WINDOWS * block, WINDOWS * BLOCKS) for block in range(BLOCKS + 1)]
    assert seen == [(label, *step) for label in ("statistics", "gradients") for step in steps]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_curves_of_any_change_are_the_explicit_sum(architecture: str) -> None:
    model = make_tiny_model(architecture)
    layers = find_layers(model)
    generator = torch.Generator().manual_seed(3)
    parts = {x.name: [0.1 * torch.randn(x.weight_OI.shape, generator=generator) for _ in LEVELS] for x in layers}
    team, extent = work_alone(Blocks(model), layers, make_windows(), BACKWARD, SEED, SCRATCH)
    kappa = measure_kappa(team, extent, layers, ignore, lambda _: [Here(parts)])
    expected = {layer.name: np.zeros(len(LEVELS)) for layer in layers}
    for window in range(BACKWARD):
        inputs, gradients = plain_gradients(model, window)
        for name, changes in parts.items():
            change = torch.zeros(changes[0].shape, dtype=torch.float64)
            for level, part in enumerate(changes):
                change += part.double()
                effect = (gradients[name] * (inputs[name] @ change.T)).sum(1)
                expected[name][level] += float(effect.square().sum())
    for name, values in kappa.items():
        np.testing.assert_allclose(values, expected[name] / (2 * BACKWARD * LENGTH), rtol=2e-3)


def test_moments_behind_pruned_blocks_are_explicit_means() -> None:
    model = make_tiny_model("llama")
    layers, windows = find_layers(model), make_windows()
    for layer in layers:
        if layer.block == 0:
            layer.write(torch.where(layer.weight_OI.abs() < 0.2, 0, layer.weight_OI))
    team, extent = work_alone(Blocks(model), layers, windows, 0, SEED, SCRATCH)
    moments = collect_moments(team, extent, Walk(0, "run"), 1, [x for x in layers if x.block == 1])
    total: dict[str, Tensor] = {}
    for ids in windows:
        with torch.no_grad(), watch_inputs(layers) as inputs:
            compute_hidden(model, ids[None])
        for name, x in inputs.items():
            total[name] = total.get(name, torch.zeros(())) + x.T @ x / windows.numel()
    for name, leader in moments.group.items():
        largest = float(total[name].max())
        torch.testing.assert_close(moments.second_moment[leader], total[name], rtol=1e-3, atol=1e-4 * largest)
        assert torch.equal(moments.mean_square[leader], moments.second_moment[leader].diagonal())


def test_mean_squares_alone_are_the_diagonal_of_the_second_moments() -> None:
    model = make_tiny_model("llama")
    layers, windows = find_layers(model), make_windows()
    first = [layer for layer in layers if layer.block == 0]
    team, extent = work_alone(Blocks(model), layers, windows, 0, SEED, SCRATCH)
    full = collect_moments(team, extent, Walk(0, "run"), 0, first)
    squares = collect_moments(team, extent, Walk(1, "run"), 0, first, full=False)
    assert squares.group == full.group and squares.second_moment == {}
    for leader, square in full.mean_square.items():
        torch.testing.assert_close(squares.mean_square[leader], square, rtol=1e-5, atol=0)


@contextmanager
def watch_inputs(layers: list[Layer]) -> Iterator[dict[str, Tensor]]:
    """What every layer reads in one forward, by name."""
    inputs: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        return lambda _module, args: inputs.__setitem__(name, args[0].detach().flatten(0, -2))

    hooks = [layer.module.register_forward_pre_hook(see(layer.name)) for layer in layers]
    yield inputs
    for hook in hooks:
        hook.remove()


def test_the_clipped_gamma_counts_no_token_for_more_than_ten_median_ones() -> None:
    model = make_tiny_model("llama")
    layers = find_layers(model)
    statistics = collect(model, layers).statistics
    expected: dict[str, Tensor] = {}
    for window in range(BACKWARD):
        for name, g in plain_gradients(model, window)[1].items():
            size = g.square().sum(1)
            weight = (CLIP * size.median() / size).clamp(max=1)
            share = (g.square() * weight[:, None]).sum(0) / (BACKWARD * LENGTH)
            expected[name] = expected.get(name, torch.zeros(())) + share
    for name, gamma in statistics.clipped_square.items():
        leant = lean_to_mean(expected[name], BACKWARD * LENGTH, PRIOR)
        torch.testing.assert_close(gamma.double(), leant, rtol=1e-3, atol=1e-5 * float(leant.max()))
