"""Find what can be pruned in a decoder, whatever its architecture calls its parts."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernels.packed import PackedLinear
from tools.base.errors import UserError


@dataclass(frozen=True)
class Layer:
    """One prunable linear layer of a loaded model."""

    name: str
    block: int
    kind: str
    module: nn.Module

    @property
    def weight_OI(self) -> Tensor:
        """A view of the weight as d_out x d_in; GPT-2's Conv1D stores the transpose."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if isinstance(self.module, Conv1D) else weight.detach()

    @property
    def stored_weight(self) -> Tensor:
        """The weight as the model's file stores it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def write(self, weight_OI: Tensor) -> None:
        """Replace the weight in place, so that tied uses and captured references stay valid."""
        with torch.no_grad():
            self.weight_OI.copy_(weight_OI)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the outermost ModuleList that holds most of the linear weights.

    Raises UserError when the model has none.
    """
    best, most = None, 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            size = sum(_weight_count(part) for part in module.modules())
            if size > most:  # a list of experts inside a block is always smaller than the list of blocks
                best, most = module, size
    if best is None:
        raise UserError("the model has no prunable linear layers inside decoder blocks")
    return best


def find_layers(model: nn.Module) -> list[Layer]:
    """Every nn.Linear and Conv1D inside the decoder blocks, in depth order; tied weights once.

    Raises UserError when there are none, or when some are packed.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise UserError("the model is packed, to be run and not to be changed; give the dense model it was made of")
    blocks = find_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    layers, seen = [], set()
    for index, block in enumerate(blocks):
        for kind, module in block.named_modules():
            if _weight_count(module) and id(module.weight) not in seen:
                seen.add(id(module.weight))
                layers.append(Layer(f"{prefix}.{index}.{kind}", index, kind, module))
    return layers


def find_unprunable(model: nn.Module) -> list[str]:
    """Names of weights inside the blocks that pruning does not reach: fused experts (3-D), other projections."""
    blocks = find_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    reached = {id(layer.module.weight) for layer in find_layers(model)}
    return [name for name, p in blocks.named_parameters(prefix) if p.ndim >= 2 and id(p) not in reached]


def _weight_count(module: nn.Module) -> int:
    if not isinstance(module, nn.Linear | Conv1D):
        return 0
    weight = module.weight
    return weight.numel() if weight.ndim == 2 and weight.is_floating_point() else 0
