"""LLM-Pruner (arXiv 2305.11627) as its authors run it (github.com/horseee/LLM-Pruner), without its fine-tuning.

Their `scripts/llama_prune.sh` has `--block_wise --pruner_type taylor --taylor param_first`, groups by `sum`:

- Score of a weight: |w dL/dw|, L the mean loss of language modelling on ten texts of 64 tokens. Of a neuron, or a head,
  the sum over all rows and columns that go with it.
- Every block loses the same share of its neurons and of its heads, its own lowest-scored, whole ones: of U units those
  beyond int(U (1 - share)) channels. What stays is left as it is.
- The first and the last blocks stay whole: of LLaMA's 32 the first four and the last two, here as much of the depth.
- The text is the caller's, evenly spread over its windows. The authors draw theirs from BookCorpus.
- A unit of attention is a KV head with the query heads that read it, as in their code for LLaMA 3 (`llama3.py`). There
  the scores of query heads are folded as if every n-th read the same KV head, where neighbours do: such heads are
  credited with others' scores. Here each counts for the KV head that it reads; without groups the scores are theirs.

Blocks end with two widths, which no stock config describes: the model is a copy with hooks (`tools.surgery.flap`).

Shape suffixes: B windows, T tokens, R runs, O output features, I input features, U units of a part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from billhook_kernels.channels import keep_highest_units
from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.models.layers import Layer
from tools.models.readout import compute_hidden, compute_logits
from tools.surgery.flap import Narrowed, Ranking
from tools.surgery.parts import KINDS, Part, find_parts

EXAMPLES, EXAMPLE_TOKENS = 10, 64
"""Texts, and tokens of each, that the gradient is taken on."""

FIRST, LAST = 4 / 32, 2 / 32
"""Shares of the depth that stay whole at the beginning and at the end."""


def rank_by_gradient(model: Any, remove: float, windows_BT: Tensor, progress: Progress, *, lead: int = 0) -> Ranking:
    """What goes so that `remove` of the weights of the blocks' linear layers does, as nearly as whole units allow.

    The first `lead` tokens of each window are no text. Raises UserError where heads or neurons cannot be cut, or too
    much or too little would go.
    """
    parts = [part for kind in KINDS for part in find_parts(model, kind)]
    depth = len(parts) // len(KINDS)
    inner = [part for part in parts if round(FIRST * depth) <= part.block < depth - round(LAST * depth)]
    total = sum(part.unit_weights * part.units for part in parts)
    share = _find_share(inner, remove * total, total)
    gradients = _sum_gradients(model, inner, _spread_runs(windows_BT[:, lead:]), progress)
    narrowed = []
    for part in inner:
        if gone := _count_gone(part, share):
            units = keep_highest_units(score_part(part, gradients), gone)
            narrowed.append(Narrowed(part, units, torch.zeros_like(part.output.weight_OI[:, 0])))
    return Ranking(narrowed, sum(_count_gone(part, share) * part.unit_weights for part in inner) / total)


def score_part(part: Part, gradients: dict[str, Tensor]) -> Tensor:
    """The sum of |w dL/dw| over all weights that go with each unit: (U,), fp64."""
    score_U = torch.zeros(part.units, dtype=torch.float64, device=part.output.weight_OI.device)
    for layer in (*part.inputs, part.output):
        salience_OI = (layer.weight_OI.double() * gradients[layer.name]).abs()
        score_U += salience_OI.sum(0 if layer is part.output else 1).view(part.units, -1).sum(1)
    return score_U


def _count_gone(part: Part, share: float) -> int:
    """Units of a part that go with a share of it, rounded as the authors' code rounds."""
    channels = part.output.weight_OI.shape[1]
    return (channels - int(channels * (1 - share))) // (channels // part.units)


def _find_share(parts: Sequence[Part], wanted: float, total: int) -> float:
    """The share of each part's units with which the number of weights that go is nearest to the one wanted.

    One unit of each stays. Raises UserError where that is no weight, or more than may go.
    """
    finest = max(part.units for part in parts)
    shares = [gone / finest for gone in range(finest)]
    shares = [share for share in shares if all(_count_gone(part, share) < part.units for part in parts)]
    weights = [sum(_count_gone(part, share) * part.unit_weights for part in parts) for share in shares]
    if wanted > weights[-1]:
        raise _refuse(wanted, "much", weights[-1], "most", total)
    best = min(range(len(shares)), key=lambda place: abs(weights[place] - wanted))
    if weights[best] == 0:
        raise _refuse(wanted, "little", min((x for x in weights if x), default=0), "least", total)
    return shares[best]


def _refuse(wanted: float, what: str, limit: int, end: str, total: int) -> UserError:
    share = f"{wanted / total:g}"
    return UserError(f"{share} is too {what} to remove: {limit / total:.2%} is the {end} that can go here")


def _spread_runs(windows_BT: Tensor) -> Tensor:
    """EXAMPLES runs of EXAMPLE_TOKENS, or as many as there are, evenly spread over the text: (R, T)."""
    length = min(EXAMPLE_TOKENS, windows_BT.shape[1])
    runs_RT = windows_BT[:, : windows_BT.shape[1] // length * length].reshape(-1, length)
    count = min(EXAMPLES, len(runs_RT))
    return runs_RT[[len(runs_RT) * i // count for i in range(count)]]


def _sum_gradients(model: Any, parts: Sequence[Part], runs_RT: Tensor, progress: Progress) -> dict[str, Tensor]:
    """dL/dW of every layer of the parts, by its name: (O, I), fp32; L is the mean over all tokens.

    Raises UserError where one is not finite.
    """
    layers = [layer for part in parts for layer in (*part.inputs, part.output)]
    parameters = [layer.parameter for layer in layers]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for i, ids_T in enumerate(runs_RT):
            progress("gradients", i, len(runs_RT))
            with torch.enable_grad():
                logits_TV = compute_logits(model, compute_hidden(model, ids_T[None])[0, :-1])
                loss = torch.nn.functional.cross_entropy(logits_TV, ids_T[1:].to(logits_TV.device)) / len(runs_RT)
                for own, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                    own += gradient
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    progress("gradients", len(runs_RT), len(runs_RT))
    for layer, own in zip(layers, sums, strict=True):
        if not bool(torch.isfinite(own).all()):
            raise UserError(f"{layer.name}: its gradient on the calibration text is not finite; try --dtype fp32")
    return {layer.name: _orient(layer, own) for layer, own in zip(layers, sums, strict=True)}


def _orient(layer: Layer, gradient: Tensor) -> Tensor:
    return gradient.T if isinstance(layer.module, Conv1D) else gradient
