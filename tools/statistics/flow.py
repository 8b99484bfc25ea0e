"""What flowed back through the layers of a block, summed over the tokens of each shard: squares, and KL curves.

Shape suffixes: T tokens, I input features (d_in), O output features (d_out), L levels, P pairs.
"""

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from billhook_kernels.statistics import clip_tokens, squared_loss_changes, sum_squares
from tools.base.failures import explain_layer
from tools.models.layers import Layer
from tools.statistics.gradients import Pair, Seen
from tools.statistics.shards import Sums, add_count

CLIP = 10.0
"""The clipped gamma counts no token for more than this many times the median token (of its window)."""


def sum_gradients(seen: Seen, shard: int, counted: Container[str], device: torch.device | None) -> Sums:
    """Over the tokens of a shard, of every layer; on a device, or where they lie.

    `plain/LAYER` and `clipped/LAYER` are the sums of g^2, (O,), fp32; `language/LAYER` is that of the mean |dL/dW| of
    each window; `n/LAYER` is how many tokens there were, of layers that are `counted`.
    """
    sums: Sums = {}
    for name, held in seen.pairs[shard].items():
        every = [pair.move(device) for pair in held] if device else held
        for mark in dict.fromkeys(pair.mark for pair in every):
            key, pairs = mark + name, [pair for pair in every if pair.mark == mark]
            plain = [sum_squares(pair.g_TO) / pair.scale**2 for pair in pairs]
            clipped = [sum_squares(clip_tokens(pair.g_TO, CLIP)) / pair.scale**2 for pair in pairs]
            sums[f"plain/{key}"] = sum(plain[1:], plain[0])
            sums[f"clipped/{key}"] = sum(clipped[1:], clipped[0])
            sums[f"language/{key}"] = torch.tensor(seen.language[shard].get(key, 0.0), dtype=torch.float64)
            if name in counted:
                add_count(sums, key, *(pair.g_TO for pair in pairs))
    return sums


def add_curve(
    layer: Layer, held: Mapping[int, Sequence[Pair]], parts: Iterable[Tensor], leaves: Mapping[int, Sums]
) -> None:
    """Add `curve/LAYER`, sum_t (g_t^T dW x_t)^2 at each level, (L,), fp64, to what is known of each shard.

    `held` are the layer's pairs by shard, and `parts` what each level adds to dW, (O, I).
    """
    pairs = {shard: [pair.move(layer.device) for pair in own] for shard, own in held.items()}
    whole = [pair for shard in pairs.values() for pair in shard]
    if not whole:  # a span without gradient windows, or an expert that these never reached
        return
    changes = (part_OI.to(layer.device) for part_OI in parts)
    with explain_layer(f"KL curve of layer {layer.name}"):
        changes_LP = squared_loss_changes([(pair.x_TI, pair.g_TO) for pair in whole], changes)
    changes_LP /= torch.tensor([pair.scale**2 for pair in whole], dtype=torch.float64).to(changes_LP.device)
    columns = changes_LP.split([len(shard) for shard in pairs.values()], 1)
    for shard, column_LP in zip(pairs, columns, strict=True):
        marks = [pair.mark for pair in pairs[shard]]
        for mark in dict.fromkeys(marks):
            own = [place for place, other in enumerate(marks) if other == mark]
            leaves[shard][f"curve/{mark}{layer.name}"] = (
                column_LP if len(own) == len(marks) else column_LP[:, own]
            ).sum(1)
            if layer.pool:
                add_count(leaves[shard], mark + layer.name, *(pairs[shard][place].x_TI for place in own))
