"""The profile of a model's prunable layers: the paper's two scores, and the predicted KL of pruning each.

Two walks over the calibration text serve all layers at once; no layer is ever pruned to measure it.

Shape suffixes: T tokens, I input features (d_in), O output features (d_out), D hidden width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.methods import LayerStatistics
from kernels.scores import score_two_sided, score_wanda
from kernels.statistics import (
    add_second_moment,
    level_of_each_weight,
    mean_absolute_gradient,
    squared_loss_changes,
    sum_squares,
)
from tools.curves import LEVELS, LayerProfile
from tools.errors import UserError
from tools.layers import Layer
from tools.readout import compute_hidden, hidden_gradients

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in all)."""


@dataclass
class ModelStatistics:
    """What the calibration text says of every layer, fp32 on the model's device."""

    mean_square: dict[str, Tensor]
    gradient_square: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    """By the name of the first layer of each group that reads the same input."""
    group: dict[str, str]
    """Layer name to the name its second moment is kept under."""
    gradient: dict[str, float]
    """The paper's gradient score."""

    def of(self, name: str) -> LayerStatistics:
        """The statistics of one layer."""
        return LayerStatistics(self.mean_square[name], self.gradient_square[name], self.second_moment[self.group[name]])


class _Taps:
    """Hooks on all layers: inputs are seen in the forward pass, output gradients in the backward pass."""

    def __init__(self, model: Any, layers: Sequence[Layer]) -> None:
        self.model, self.layers = model, layers
        self.on_input: Callable[[Layer, Tensor], None] = lambda layer, x: None
        self.on_gradient: Callable[[Layer, Tensor, Tensor], None] = lambda layer, x, g: None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach for the length of a block; gradients flow from the embeddings though all weights are frozen."""
        hooks = [layer.module.register_forward_hook(self._tap(layer)) for layer in self.layers]
        embeddings = self.model.get_input_embeddings()
        hooks.append(embeddings.register_forward_hook(lambda module, args, out: self._start_graph(out)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _start_graph(self, embedded: Tensor) -> Tensor:
        return embedded.requires_grad_() if torch.is_grad_enabled() else embedded

    def _tap(self, layer: Layer) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def see(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_TI = inputs[0].detach().flatten(0, -2)
            self.on_input(layer, x_TI)
            if output.requires_grad:
                output.register_hook(lambda g: self.on_gradient(layer, x_TI, g.flatten(0, -2)))

        return see


def _backward(model: Any, ids_T: Tensor, window: int, seed: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """One forward; then what to back-propagate, as ("fisher", run) and ("language", run)."""
    hidden_TD = compute_hidden(model, ids_T[None])[0]
    # Every window has a generator of its own, so that labels do not depend on the order of the windows.
    generator = torch.Generator(device=ids_T.device).manual_seed(seed * 1_000_003 + window)
    fisher_TD, language_TD = hidden_gradients(model, ids_T, hidden_TD, generator)
    yield "fisher", lambda: hidden_TD.backward(fisher_TD, retain_graph=True)
    yield "language", lambda: hidden_TD.backward(language_TD)


def collect_statistics(
    model: Any, layers: Sequence[Layer], windows_BT: Tensor, gradient_windows: int, seed: int, progress: Progress
) -> ModelStatistics:
    """First walk: input moments over all windows, output-gradient moments over the first `gradient_windows`.

    Layers that read the same tensor (q, k and v; gate and up) share one second moment. All sums are fp32. Raises
    UserError for a layer that never ran, such as an expert that no token was sent to.
    """
    device = windows_BT.device
    moments: dict[str, Tensor] = {}
    group: dict[str, str] = {}
    gammas = {layer.name: torch.zeros(layer.weight_OI.shape[0], device=device) for layer in layers}
    gradient = {layer.name: 0.0 for layer in layers}
    mode = ""
    last: tuple[str, Tensor | None] = ("", None)

    def on_input(layer: Layer, x_TI: Tensor) -> None:
        nonlocal last
        known = last[1]
        shares = known is not None and known.data_ptr() == x_TI.data_ptr() != 0 and known.shape == x_TI.shape
        leader = group.setdefault(layer.name, last[0] if shares else layer.name)
        if leader == layer.name:
            width = x_TI.shape[1]
            add_second_moment(moments.setdefault(leader, torch.zeros(width, width, device=device)), x_TI)
            last = (leader, x_TI)

    def on_gradient(layer: Layer, x_TI: Tensor, g_TO: Tensor) -> None:
        if mode == "fisher":
            gammas[layer.name] += sum_squares(g_TO)
        else:
            gradient[layer.name] += mean_absolute_gradient(g_TO, x_TI)

    taps = _Taps(model, layers)
    taps.on_input, taps.on_gradient = on_input, on_gradient
    total, length = windows_BT.shape
    with taps.attached():
        for i, ids_T in enumerate(windows_BT):
            progress("statistics", i, total)
            if i < gradient_windows:
                for kind, run in _backward(model, ids_T, i, seed):
                    mode = kind
                    run()
            else:
                with torch.no_grad():
                    compute_hidden(model, ids_T[None])
            last = ("", None)
    progress("statistics", total, total)
    for name in gradient.keys() - group.keys():
        raise UserError(f"layer {name} never ran on the calibration text, so that nothing is known of it")
    for moment in moments.values():
        moment /= total * length
    tokens = min(gradient_windows, total) * length
    return ModelStatistics(
        mean_square={name: moments[leader].diagonal().clone() for name, leader in group.items()},
        gradient_square={name: gamma / tokens for name, gamma in gammas.items()},
        second_moment=moments,
        group=group,
        gradient={name: value / min(gradient_windows, total) for name, value in gradient.items()},
    )


def measure_kappa(
    model: Any,
    layers: Sequence[Layer],
    statistics: ModelStatistics,
    windows_BT: Tensor,
    seed: int,
    progress: Progress,
    dense: Mapping[str, Tensor] | None = None,
) -> dict[str, list[float]]:
    """Second walk: the KL each layer is predicted to cost at each of LEVELS, two-sided mask, nats per token.

    kappa(s) = 1/(2T) sum_t (g_t^T dW(s) x_t)^2 with g from labels drawn from the model itself. dW is taken from the
    `dense` weights where they are given, else from those in the model.
    """
    levels = {layer.name: _levels(layer.name, _weight(layer, dense), statistics) for layer in layers}
    totals = {layer.name: torch.zeros(len(LEVELS), dtype=torch.float64, device=windows_BT.device) for layer in layers}

    def on_gradient(layer: Layer, x_TI: Tensor, g_TO: Tensor) -> None:
        totals[layer.name] += squared_loss_changes(g_TO, x_TI, _weight(layer, dense), levels[layer.name], len(LEVELS))

    taps = _Taps(model, layers)
    taps.on_gradient = on_gradient
    with taps.attached():
        for i, ids_T in enumerate(windows_BT):
            progress("KL curves", i, len(windows_BT))
            _, run = next(_backward(model, ids_T, i, seed))
            run()
    progress("KL curves", len(windows_BT), len(windows_BT))
    return {name: (total / (2 * windows_BT.numel())).tolist() for name, total in totals.items()}


def _weight(layer: Layer, dense: Mapping[str, Tensor] | None) -> Tensor:
    return layer.weight_OI if dense is None else dense[layer.name].to(layer.weight_OI.device)


def _levels(name: str, weight_OI: Tensor, statistics: ModelStatistics) -> Tensor:
    score_OI = score_two_sided(weight_OI, statistics.mean_square[name], statistics.gradient_square[name])
    return level_of_each_weight(score_OI, weight_OI == 0, [round(s * weight_OI.numel()) for s in LEVELS])


def build_profile(
    layers: Sequence[Layer],
    statistics: ModelStatistics,
    kappa: dict[str, list[float]],
    dense: Mapping[str, Tensor] | None = None,
) -> list[LayerProfile]:
    """The table of layers, with z-scores over all of them; of the `dense` weights where they are given."""
    weights = [_weight(layer, dense) for layer in layers]
    wanda = [
        _wanda_percentile(weight_OI, statistics.mean_square[layer.name])
        for layer, weight_OI in zip(layers, weights, strict=True)
    ]
    gradient = [statistics.gradient[layer.name] for layer in layers]
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
            kappa=kappa[layer.name],
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
