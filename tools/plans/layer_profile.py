"""What is known of each prunable layer, and the KL curve that says what pruning it costs. No torch in here."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from tools.base.errors import ImpossiblePlan

Array = NDArray[np.float64]

LEVELS = (0.15, 0.3, 0.45, 0.6, 0.75)
"""Sparsities at which the KL curve of a layer is measured."""


class LayerProfile(BaseModel):
    """What an agent may know of one prunable linear layer (arXiv 2601.09694, and the kappa curve)."""

    name: str
    block: int = Field(description="Index of the decoder block that holds the layer.")
    kind: str = Field(description="The layer's name inside its block, such as self_attn.q_proj.")
    weights: int = Field(description="Number of weights, zero or not.")
    zeros: int = Field(description="Exact zeros in the dense weights (dequantised models have some).")
    wanda: float = Field(description="10th percentile of |W|*sqrt(a) over the non-zero weights.")
    wanda_z: float
    gradient: float = Field(description="Mean over the weights of the mean |dL/dW| over calibration samples.")
    gradient_z: float
    kappa: list[float] = Field(description="Predicted KL in nats/token at each of LEVELS, this layer pruned alone.")
    inputs: int = Field(0, description="Length of a row of the weight, d_in; 0 where it was not recorded.")
    peak: float | None = Field(
        None,
        description="Share of the one strongest input channel in the mean squares of all: near 1 where activations are "
        "massive (arXiv 2402.17762); null where nothing was measured.",
    )
    outliers: float | None = Field(
        None, description="OWL's D of the layer's block, the same for all its layers: percentage of far-out scores."
    )
    alpha: float | None = Field(
        None, description="AlphaPruning's exponent of the tail of the weight's spectrum; null without such a tail."
    )


def level_curve(layer: LayerProfile) -> Array:
    """The layer's KL at each of LEVELS, nats per token, made non-decreasing and kept above 0."""
    curve: Array = np.maximum.accumulate(np.maximum(np.array(layer.kappa), 1e-12))
    return curve


def predict_layer_kl(layer: LayerProfile, sparsity: Array) -> Array:
    """The layer's KL curve (nats/token) at any sparsities: log KL linear in s between LEVELS.

    Below the first level it falls to 0 by the power law of the first two levels; above the last it goes on with the
    last slope. It never falls nor reaches 0 (`level_curve`), since dequantised weights hold zeros that cost nothing.
    """
    levels = np.array(LEVELS)
    kappa = level_curve(layer)
    log = np.log(kappa)
    power = np.clip((log[1] - log[0]) / np.log(levels[1] / levels[0]), 1.0, 8.0)
    below = kappa[0] * (np.minimum(sparsity, levels[0]) / levels[0]) ** power
    slope = (log[-1] - log[-2]) / (levels[-1] - levels[-2])
    above = log[-1] + slope * (sparsity - levels[-1])
    within = np.interp(sparsity, levels, log)
    return np.where(sparsity <= levels[0], below, np.exp(np.where(sparsity > levels[-1], above, within)))


def predict_kl(layers: Sequence[LayerProfile], sparsity: Array) -> float:
    """Sum of the layers' KL curves at their sparsities, nats per token."""
    return float(sum(predict_layer_kl(layer, s[None])[0] for layer, s in zip(layers, sparsity, strict=True)))


def merge_numbers(kind: str) -> str:
    """The kind of all numbered siblings (experts): a glob."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind)


def group_layers(layers: Sequence[LayerProfile], *, merge: bool = False) -> dict[str, list[LayerProfile]]:
    """Layers by kind and third of the model's depth; the keys are selectors. `merge` takes experts together."""
    depth = max(layer.block for layer in layers) + 1
    edges = [round(depth * i / 3) for i in range(4)]
    groups: dict[str, list[LayerProfile]] = {}
    for first, end in pairwise(edges):
        for layer in layers:
            if first <= layer.block < end:
                kind = merge_numbers(layer.kind) if merge else layer.kind
                groups.setdefault(f"blocks {first}-{end - 1} · {kind}", []).append(layer)
    return groups


MOST_SELECTOR = 200
"""Characters of a selector that a planner or an agent writes."""


def select_layers(selector: str, layers: Sequence[LayerProfile]) -> list[str]:
    """Names of the layers a selector means, in layer order.

    A selector is a glob over layer names (or a bare last name such as `v_proj`), optionally after a range of blocks:
    `*.v_proj`, `*.[qk]_proj`, `blocks 0-3`, `blocks 0-3,29 · *.v_proj`; or several of them, between semicolons, which
    means what any of them does. Raises ImpossiblePlan when one is not of that form or means no layer.
    """
    chosen = {name for part in selector.split(";") for name in _select_part(part, layers)}
    return [layer.name for layer in layers if layer.name in chosen]


def _select_part(selector: str, layers: Sequence[LayerProfile]) -> list[str]:
    form = re.fullmatch(r"\s*(?:blocks?\s+(?P<blocks>\d[\d\s,-]*))?\s*[·:]?\s*(?P<glob>\S*)\s*", selector)
    if form is None or not (form["blocks"] or form["glob"]):
        raise ImpossiblePlan(f"selector {selector[:80]!r} is not a glob such as '*.v_proj' or 'blocks 0-3 · *.v_proj'")
    blocks = _parse_blocks(form["blocks"]) if form["blocks"] else None
    glob = form["glob"] or "*"
    names = [
        layer.name
        for layer in layers
        if (blocks is None or any(layer.block in part for part in blocks))
        and any(fnmatchcase(text, glob) for text in (layer.name, layer.kind, layer.name.rsplit(".", 1)[-1]))
    ]
    if not names:
        problem = "globs are set apart by ';'" if "," in glob else f"layers are named like {layers[0].name!r}"
        raise ImpossiblePlan(f"selector {selector[:80]!r} means no layer; {problem}")
    return names


def _parse_blocks(text: str) -> list[range]:
    blocks = []
    for part in re.split(r"[,\s]+", text.strip(" ,")):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if ends is None:
            raise ImpossiblePlan(f"{part!r} is not a range of blocks such as 0-3")
        blocks.append(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return blocks
