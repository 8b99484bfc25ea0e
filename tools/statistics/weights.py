"""How much each token of a calibration text counts in the second moment that a layer's update goes by.

A refit minimises the error of a layer's output over all tokens alike. What the loss feels of that error is, to second
order, its square times that of the gradient there: a token at whose output little flows back may be missed by far.

Shape suffixes: B windows, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from billhook_kernels.statistics import weigh_tokens
from tools.base.errors import UnknownStatistics
from tools.models.layers import Layer
from tools.statistics.extent import Extent
from tools.statistics.flow import CLIP
from tools.statistics.requests import SizeTokens, Team, ignore_ticks
from tools.statistics.walk import Walk


def weigh_block(team: Team, extent: Extent, walk: Walk, block: int, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Weights of the tokens that the layers of a block read, (windows, T), fp32 on the CPU, mean one.

    Each is the squared gradient at the layer's output, of -log p of labels drawn from the model itself, at most CLIP
    times the median token's of the whole text. `walk` goes through every window, from the last block down. Raises
    UnknownStatistics where gradients are not finite.
    """
    sizes: dict[str, dict[int, Tensor]] = {}
    for answer in team.ask(SizeTokens(walk, block))(ignore_ticks):
        for name, windows in answer.items():
            sizes.setdefault(name, {}).update(windows)
    weights = {}
    for layer in layers:
        size_BT = torch.stack([sizes[layer.name][window] for window in range(extent.windows)])
        if not bool(size_BT.isfinite().all()):
            raise UnknownStatistics(f"gradients of {layer.name} are not finite; try --dtype fp32 or bf16")
        weights[layer.name] = weigh_tokens(size_BT.flatten(), CLIP).view_as(size_BT)
    return weights
