"""The profile of a model's prunable layers: the paper's two scores, and the predicted KL of pruning each.

The calibration text walks up through the blocks, one after another, and its gradients walk down again: at no time is
more held than the inputs of all blocks (in CPU memory) and what one block needs. No layer is ever pruned to measure it.

Shape suffixes: T tokens, I input features (d_in), O output features (d_out), D hidden width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.scores import score_two_sided, score_wanda
from kernels.statistics import (
    add_second_moment,
    clip_tokens,
    level_of_each_weight,
    mean_absolute_gradient,
    nested_parts,
    squared_loss_changes,
    sum_squares,
)
from tools.baselines import measure_outliers
from tools.blocks import Blocks
from tools.curves import LEVELS, LayerProfile
from tools.errors import UserError
from tools.layers import Layer
from tools.readout import compute_hidden, hidden_gradients
from tools.states import StateStack

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all)."""

CLIP = 10.0
"""The clipped gamma counts no token for more than this many times the median token (of its window)."""


@dataclass
class ModelStatistics:
    """What the calibration text says of every layer, fp32 on the model's device."""

    mean_square: dict[str, Tensor]
    gradient_square: dict[str, Tensor]
    clipped_square: dict[str, Tensor]
    """Gamma with each token clipped at CLIP times the median one."""
    group: dict[str, str]
    """Layer name to the first layer that reads the same input, under whose name their second moment is kept."""
    gradient: dict[str, float]
    """The paper's gradient score."""
    kappa: dict[str, list[float]]
    """The KL each layer is predicted to cost at each of LEVELS, two-sided mask, nats per token."""


class Moments(NamedTuple):
    """What one block's layers read; fp32, by the first layer of each group that reads the same tensor (q, k and v)."""

    mean_square: dict[str, Tensor]
    """Mean of x^2 of each input."""
    second_moment: dict[str, Tensor]
    """Mean of x x^T; empty where only the mean squares were asked for."""
    group: dict[str, str]


class BlockGradients(NamedTuple):
    """What flows back through one block."""

    pairs: dict[str, list[tuple[Tensor, Tensor]]]
    """Layer name to (input x (T, I), gradient g (T, O) of -log p of drawn labels) of every window."""
    language: dict[str, float]
    """Mean over the weights of |dL/dW| of the language modelling loss, summed over the windows."""


@contextmanager
def _tapped(
    layers: Iterable[Layer],
    on_input: Callable[[Layer, Tensor], None],
    on_gradient: Callable[[Layer, Tensor, Tensor], None] | None = None,
) -> Iterator[None]:
    """Hooks on layers: their inputs are seen in the forward pass, their output gradients in the backward pass."""

    def tap(layer: Layer) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def see(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_TI = inputs[0].detach().flatten(0, -2)
            on_input(layer, x_TI)
            if on_gradient is not None and output.requires_grad:
                output.register_hook(lambda g: on_gradient(layer, x_TI, g.flatten(0, -2)))

        return see

    hooks = [layer.module.register_forward_hook(tap(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layers_by_block(layers: Iterable[Layer], count: int) -> list[list[Layer]]:
    """The layers of each of `count` blocks."""
    grouped: list[list[Layer]] = [[] for _ in range(count)]
    for layer in layers:
        grouped[layer.block].append(layer)
    return grouped


def embed_windows(blocks: Blocks, windows_BT: Tensor) -> list[Tensor]:
    """What the first block reads of every window, on CPU."""
    return [blocks.embed(ids_T).cpu() for ids_T in windows_BT]


@torch.no_grad()
def run_block(blocks: Blocks, block: int, windows_BT: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a block makes of its inputs, window by window, on CPU."""
    device = windows_BT.device
    return [blocks.run(ids_T, block, x.to(device)).cpu() for ids_T, x in zip(windows_BT, inputs, strict=True)]


def collect_moments(
    blocks: Blocks,
    block: int,
    layers: Sequence[Layer],
    windows_BT: Tensor,
    inputs: Sequence[Tensor],
    *,
    full: bool = True,
) -> tuple[Moments, list[Tensor]]:
    """(moments of what a block's layers read, the block's outputs). fp32, means over all tokens.

    The mean squares alone, not `full`, are all that masks without an update need, at a fraction of the products.
    Raises UserError for a layer that never ran, such as an expert that no token was sent to.
    """
    sums: dict[str, Tensor] = {}
    group: dict[str, str] = {}
    last: tuple[str, Tensor | None] = ("", None)

    def on_input(layer: Layer, x_TI: Tensor) -> None:
        nonlocal last
        known = last[1]
        shares = known is not None and known.data_ptr() == x_TI.data_ptr() != 0 and known.shape == x_TI.shape
        leader = group.setdefault(layer.name, last[0] if shares else layer.name)
        if leader == layer.name:
            if leader not in sums:
                width = x_TI.shape[1]
                sums[leader] = torch.zeros((width, width) if full else width, device=x_TI.device)
            if full:
                add_second_moment(sums[leader], x_TI)
            else:
                sums[leader] += sum_squares(x_TI)
            last = (leader, x_TI)

    with _tapped(layers, on_input):
        outputs = run_block(blocks, block, windows_BT, inputs)
    for layer in layers:
        if layer.name not in group:
            raise UserError(f"layer {layer.name} never ran on the calibration text, so that nothing is known of it")
    for total in sums.values():
        total /= windows_BT.numel()
    if full:
        return Moments({leader: total_II.diagonal() for leader, total_II in sums.items()}, sums, group), outputs
    return Moments(sums, {}, group), outputs


def walk_back(
    blocks: Blocks,
    layers: Sequence[Layer],
    windows_BT: Tensor,
    inputs: StateStack,
    seed: int,
    progress: Progress,
    *,
    language: bool,
) -> Iterator[BlockGradients]:
    """Back-propagate through one block after another, from the last to the first; yields what each one saw.

    `inputs` has those of every block, for every window, the last block's on top. Each block runs forward once more,
    so that only its own graph is held. Labels are drawn from the model's own predictions; with `language`
    the language modelling loss of the text is back-propagated too.
    """
    model, device, last = blocks.model, windows_BT.device, len(blocks) - 1
    grouped = layers_by_block(layers, len(blocks))
    above: list[tuple[Tensor, ...]] = [()] * len(windows_BT)
    for block in range(last, -1, -1):
        seen = BlockGradients({layer.name: [] for layer in grouped[block]}, {x.name: 0.0 for x in grouped[block]})
        entered = inputs.pop()
        fisher = True

        def on_gradient(layer: Layer, x_TI: Tensor, g_TO: Tensor) -> None:
            if fisher:  # noqa: B023
                seen.pairs[layer.name].append((x_TI, g_TO))  # noqa: B023
            else:
                seen.language[layer.name] += mean_absolute_gradient(g_TO, x_TI)  # noqa: B023

        for i, ids_T in enumerate(windows_BT):
            progress("gradients", (last - block) * len(windows_BT) + i, len(blocks) * len(windows_BT))
            x_BTD = entered[i].to(device).detach().requires_grad_()
            with _tapped(grouped[block], lambda layer, x: None, on_gradient):
                if block == last:
                    with blocks.only(block, block + 1, ids_T, x_BTD):
                        output = compute_hidden(model, ids_T[None])
                    # Every window has a generator of its own: labels do not depend on the order of the windows.
                    generator = torch.Generator(device=device).manual_seed(seed * 1_000_003 + i)
                    drawn_TD, text_TD = hidden_gradients(model, ids_T, output[0], generator)
                    above[i] = (drawn_TD[None], text_TD[None])
                else:
                    output = blocks.run(ids_T, block, x_BTD)
                fisher = True
                below = torch.autograd.grad(output, x_BTD, above[i][0].to(device), retain_graph=language)
                if language:
                    fisher = False
                    below += torch.autograd.grad(output, x_BTD, above[i][1].to(device))
            above[i] = tuple(gradient.cpu() for gradient in below)
        yield seen
    progress("gradients", len(blocks) * len(windows_BT), len(blocks) * len(windows_BT))


def collect_statistics(
    model: Any,
    layers: Sequence[Layer],
    windows_BT: Tensor,
    gradient_windows: int,
    seed: int,
    progress: Progress,
    keep_moment: Callable[[str, Tensor], None] | None,
    scratch: Path,
    dense: Mapping[str, Tensor] | None = None,
) -> ModelStatistics:
    """Input moments over all windows; output-gradient moments and KL curves over the first `gradient_windows`.

    Each second moment is handed to `keep_moment` (name of its group, A) as soon as it is whole, and not held; without
    it only mean squares are collected. In the directory `scratch` lie, meanwhile, the inputs of all blocks for the
    gradient windows.
    kappa(s) = 1/(2T) sum_t (g_t^T dW(s) x_t)^2 with g from labels drawn from the model itself; dW is what the
    two-sided mask removes of the `dense` weights where they are given, else of those in the model. Raises UserError for
    a layer that never ran.
    """
    blocks = Blocks(model)
    grouped = layers_by_block(layers, len(blocks))
    mean_square: dict[str, Tensor] = {}
    group: dict[str, str] = {}
    states = embed_windows(blocks, windows_BT)
    with StateStack(scratch) as inputs:
        for block in range(len(blocks)):
            progress("statistics", block, len(blocks))
            inputs.push(states[:gradient_windows])
            full = keep_moment is not None
            moments, states = collect_moments(blocks, block, grouped[block], windows_BT, states, full=full)
            group |= moments.group
            mean_square |= {name: moments.mean_square[leader].clone() for name, leader in moments.group.items()}
            if keep_moment is not None:
                for leader, moment_II in moments.second_moment.items():
                    keep_moment(leader, moment_II)
        progress("statistics", len(blocks), len(blocks))
        del states  # the way down needs the gradient windows only

        windows_BT = windows_BT[:gradient_windows]
        tokens, device = windows_BT.numel(), windows_BT.device
        statistics = ModelStatistics(mean_square, {}, {}, group, {}, {})
        back = walk_back(blocks, layers, windows_BT, inputs, seed, progress, language=True)
        for block, seen in zip(reversed(range(len(blocks))), back, strict=True):
            for layer in grouped[block]:
                name, pairs = layer.name, seen.pairs[layer.name]
                nothing = torch.zeros(layer.weight_OI.shape[0], device=device)
                gamma_O = sum((sum_squares(g_TO) for _, g_TO in pairs), nothing) / tokens
                clipped_O = sum((sum_squares(clip_tokens(g_TO, CLIP)) for _, g_TO in pairs), nothing) / tokens
                statistics.gradient_square[name], statistics.clipped_square[name] = gamma_O, clipped_O
                statistics.gradient[name] = seen.language[name] / len(windows_BT)
                weight_OI = _weight(layer, dense)
                parts = _parts_of_mask(weight_OI, mean_square[name], gamma_O)
                statistics.kappa[name] = _kappa(pairs, parts, tokens)
    return statistics


def measure_kappa(
    model: Any,
    layers: Sequence[Layer],
    windows_BT: Tensor,
    seed: int,
    progress: Progress,
    parts_of: Callable[[str], Iterable[Tensor]],
    scratch: Path,
) -> dict[str, list[float]]:
    """The KL curve of each layer for any change: `parts_of(name)` is what each of LEVELS changes beyond the last.

    One walk up and one down over the windows; nats per token, and `scratch` used, as in `collect_statistics`.
    """
    blocks = Blocks(model)
    grouped = layers_by_block(layers, len(blocks))
    kappa: dict[str, list[float]] = {}
    states = embed_windows(blocks, windows_BT)
    with StateStack(scratch) as inputs:
        for block in range(len(blocks)):
            inputs.push(states)
            states = run_block(blocks, block, windows_BT, states) if block < len(blocks) - 1 else []
        back = walk_back(blocks, layers, windows_BT, inputs, seed, progress, language=False)
        for block, seen in zip(reversed(range(len(blocks))), back, strict=True):
            for layer in grouped[block]:
                kappa[layer.name] = _kappa(seen.pairs[layer.name], parts_of(layer.name), windows_BT.numel())
    return kappa


def _kappa(pairs: list[tuple[Tensor, Tensor]], parts: Iterable[Tensor], tokens: int) -> list[float]:
    if not pairs:  # an expert that these windows never reached
        return [0.0] * len(LEVELS)
    return [float(total) for total in squared_loss_changes(pairs, parts) / (2 * tokens)]


def _parts_of_mask(weight_OI: Tensor, mean_square_I: Tensor, gradient_square_O: Tensor) -> Iterator[Tensor]:
    """What the two-sided mask removes at each of LEVELS beyond the last."""
    score_OI = score_two_sided(weight_OI, mean_square_I, gradient_square_O)
    zeros = [round(level * weight_OI.numel()) for level in LEVELS]
    return nested_parts(weight_OI, level_of_each_weight(score_OI, weight_OI == 0, zeros), len(LEVELS))


def _weight(layer: Layer, dense: Mapping[str, Tensor] | None) -> Tensor:
    return layer.weight_OI if dense is None else dense[layer.name].to(layer.weight_OI.device)


def build_profile(
    layers: Sequence[Layer],
    statistics: ModelStatistics,
    dense: Mapping[str, Tensor] | None = None,
) -> list[LayerProfile]:
    """The table of layers, with z-scores over all of them; of the `dense` weights where they are given."""
    weights = [_weight(layer, dense) for layer in layers]
    wanda = [
        _wanda_percentile(weight_OI, statistics.mean_square[layer.name])
        for layer, weight_OI in zip(layers, weights, strict=True)
    ]
    gradient = [statistics.gradient[layer.name] for layer in layers]
    outliers: dict[int, float] = {}
    for block in sorted({layer.block for layer in layers}):
        members = [
            (w, statistics.mean_square[x.name]) for x, w in zip(layers, weights, strict=True) if x.block == block
        ]
        outliers[block] = measure_outliers([w for w, _ in members], [a for _, a in members])
    return [
        LayerProfile(
            name=layer.name,
            block=layer.block,
            kind=layer.kind,
            weights=weight_OI.numel(),
            zeros=int((weight_OI == 0).sum()),
            wanda=w,
            wanda_z=w_z,
            gradient=g,
            gradient_z=g_z,
            kappa=statistics.kappa[layer.name],
            inputs=weight_OI.shape[1],
            outliers=outliers[layer.block],
        )
        for layer, weight_OI, w, w_z, g, g_z in zip(
            layers, weights, wanda, compute_z_scores(wanda), gradient, compute_z_scores(gradient), strict=True
        )
    ]


def _wanda_percentile(weight_OI: Tensor, mean_square_I: Tensor) -> float:
    """10th percentile of the Wanda scores of the active (non-zero) weights, exactly the ceil(n/10)-th smallest."""
    scores = score_wanda(weight_OI, mean_square_I)[weight_OI != 0]
    if scores.numel() == 0:
        return 0.0
    return float(np.percentile(scores.cpu().numpy(), 10, method="inverted_cdf"))


def compute_z_scores(values: Sequence[float], epsilon: float = 1e-12) -> list[float]:
    """(v - mean) / (std + epsilon) over all layers (arXiv 2601.09694); std of the population."""
    array = np.array(values, dtype=np.float64)
    return [float(z) for z in (array - array.mean()) / (array.std() + epsilon)]
