"""Which of the layers that look linear a model runs as linear layers, so that statistics say what pruning them does."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tools.base.errors import UserError
from tools.models.blocks import Blocks, run_whole
from tools.models.layers import Layer
from tools.models.positions import CHECKED

_IDLE = "is not called on text, and stays dense"
_ODD = "computes something else than a product with its weights, and stays dense"
_CUT_OFF = "gets no gradient, and stays dense"
_ELSEWHERE = "is called in another block than its own, and stays dense"
_TIED = "is called in several places, and judged by what it does in the first"


def keep_linear(blocks: Blocks, layers: Sequence[Layer], ids_T: Tensor) -> tuple[list[Layer], list[str]]:
    """(the layers that run as linear layers on 16 tokens and get a gradient; a line for each kind that is special).

    The others have to stay dense: without a gradient, pruning them would seem to cost nothing. An expert may well
    get none of so few tokens, and stays in. Raises UserError when no layer is left.
    """
    ran: set[str] = set()
    reached: set[str] = set()
    odd: set[str] = set()

    def watch(layer: Layer) -> Callable[..., None]:
        def see(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ran.add(layer.name)
            if not inputs or not isinstance(output, Tensor) or not _is_product(layer, inputs[0], output):
                odd.add(layer.name)
            elif output.requires_grad:
                output.register_hook(lambda _gradient: reached.add(layer.name))

        return see

    hooks = [layer.module.register_forward_hook(watch(layer)) for layer in layers]
    try:
        run_whole(blocks, ids_T[:CHECKED])
    finally:
        for hook in hooks:
            hook.remove()
    tied = _find_tied(blocks, layers)
    dense = {layer.name: _IDLE for layer in layers if layer.name not in ran and not layer.pool}
    dense |= dict.fromkeys(ran - reached, _CUT_OFF) | dict.fromkeys(odd, _ODD) | dict.fromkeys(tied - ran, _ELSEWHERE)
    kept = [layer for layer in layers if layer.name not in dense]
    if not kept:
        raise UserError(f"no layer of {type(blocks.model).__name__} runs as a linear layer; it is not supported yet")
    told = dict.fromkeys(tied, _TIED) | dense
    return kept, list(
        dict.fromkeys(f"{_merge_blocks(layer.name)} {told[layer.name]}" for layer in layers if layer.name in told)
    )


def _find_tied(blocks: Blocks, layers: Sequence[Layer]) -> set[str]:
    """Names of layers whose weights stand in several places of the blocks."""
    names = {id(layer.parameter): layer.name for layer in layers}
    found = [names.get(id(getattr(m, "weight", None))) for block in blocks.modules for m in block.modules()]
    return {name for name, count in Counter(found).items() if name is not None and count > 1}


def _merge_blocks(name: str) -> str:
    return re.sub(r"[.][0-9]+[.]", ".*.", name, count=1)


@torch.no_grad()
def _is_product(layer: Layer, x: Any, y: Tensor) -> bool:
    outputs, inputs = layer.weight_OI.shape
    if not isinstance(x, Tensor) or x.shape[-1] != inputs or y.shape != (*x.shape[:-1], outputs):
        return False
    bias = getattr(layer.module, "bias", None)
    own = linear(x, layer.weight_OI, bias if isinstance(bias, Tensor) else None).float()
    return torch.allclose(own, y.float(), rtol=2e-2, atol=1e-2 * float(own.nan_to_num().abs().max()), equal_nan=True)
