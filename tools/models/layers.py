"""Find what can be pruned in a decoder, whatever its architecture calls its parts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tools.base.errors import UserError
from tools.models.experts import ExpertLinear, is_fused, list_stacked, split_experts

STREAMED = "_billhook_streamed"
"""Under this name a module whose weights lie on disk (`tools.models.streamed`) has its block as it comes from there."""

LEAST_SHARE = 0.5
"""Share of the blocks' weights below which a run wants to be told that pruning the rest is meant."""


class StreamedBlock(Protocol):
    """A block whose weights lie on disk."""

    device: torch.device
    """Where it runs."""

    def touch(self) -> None:
        """Its weights are about to be read or written: those of the block before it may leave the memory."""


@dataclass(frozen=True)
class Layer:
    """One prunable linear layer of a loaded model."""

    name: str
    block: int
    kind: str
    """Its name inside the block; all fused experts of a block share one for each projection."""
    module: nn.Module
    pool: str = ""
    """Of an expert: what its layer and the same one of its fellows have in common in their names; "" of all others."""

    @property
    def weight_OI(self) -> Tensor:
        """A view of the weight as d_out x d_in; GPT-2's Conv1D stores the transpose."""
        weight = self._take()
        return weight.detach().T if isinstance(self.module, Conv1D) else weight.detach()

    @property
    def stored_weight(self) -> Tensor:
        """The weight as the model's file stores it."""
        return self._take().detach()

    def _take(self) -> Tensor:
        if streamed := _find_streamed(self._owner):
            streamed.touch()
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _owner(self) -> nn.Module:
        return self.module.experts if isinstance(self.module, ExpertLinear) else self.module

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return find_device(self._owner)

    @property
    def is_streamed(self) -> bool:
        """Whether its weights lie on disk."""
        return _find_streamed(self._owner) is not None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, which all experts of a fused set share."""
        return self.module.stacked if isinstance(self.module, ExpertLinear) else self.module.get_parameter("weight")

    @property
    def bias_O(self) -> Tensor | None:
        """What it adds to its output, if it has such a thing."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    def write(self, weight_OI: Tensor) -> None:
        """Replace the weight in place, so that tied uses and captured references stay valid."""
        with torch.no_grad():
            self.weight_OI.copy_(weight_OI)


class Biases:
    """The biases of layers, which only cuts change."""

    def __init__(self) -> None:
        """All layers have what they were loaded with."""
        self._dense: dict[Layer, Tensor] = {}
        """What those were loaded with that have, or may have, another now."""

    def write(self, layer: Layer, bias_O: Tensor | None) -> None:
        """Put a bias into a layer, or where none is given what it was loaded with."""
        if bias_O is None and layer not in self._dense:
            return
        own_O = layer.bias_O
        assert own_O is not None, "only biases that were there change"
        dense_O = self._dense.setdefault(layer, own_O.clone())
        with torch.no_grad():
            own_O.copy_(dense_O if bias_O is None else bias_O)
        if bias_O is None:
            del self._dense[layer]

    def read_moved(self, layer: Layer) -> dict[str, Tensor]:
        """The bias of a layer where it is another than the one it was loaded with, as its artifact has it."""
        return {"bias": layer.bias_O.cpu()} if layer in self._dense and layer.bias_O is not None else {}


def find_device(module: nn.Module) -> torch.device:
    """Where a module with weights runs."""
    streamed = _find_streamed(module)
    return streamed.device if streamed else next(module.parameters()).device


def _find_streamed(module: nn.Module) -> StreamedBlock | None:
    return getattr(module, STREAMED, None)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the outermost ModuleList that holds most of the linear weights.

    Raises UserError when the model has none.
    """
    best, most = None, 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            size = _count_weights(module)
            if size > most:  # a list of experts inside a block is always smaller than the list of blocks
                best, most = module, size
    if best is None:
        raise UserError("the model has no prunable linear layers inside decoder blocks")
    return best


def name_blocks(model: nn.Module) -> str:
    """The name under which a model has the list of its decoder blocks, such as `model.layers`."""
    blocks = find_blocks(model)
    name: str = next(name for name, module in model.named_modules() if module is blocks)
    return name


def find_layers(model: nn.Module) -> list[Layer]:
    """Every nn.Linear and Conv1D inside the decoder blocks, and every projection of fused experts, in depth order.

    Tied weights come once, and what chooses experts not at all. Raises UserError when there are none.
    """
    blocks = find_blocks(model)
    prefix = name_blocks(model)
    layers: list[Layer] = []
    seen: set[int] = set()
    for index, block in enumerate(blocks):
        at = f"{prefix}.{index}"
        lists, stacks = _find_experts(block)
        routers = _find_routers(block, lists | stacks)
        for kind, module in block.named_modules():
            if is_fused(module) and id(module.down_proj) not in seen:
                seen.add(id(module.down_proj))
                layers += _list_experts(module, index, at, kind)
            elif _weight_count(module) and id(module.weight) not in seen and kind not in routers:
                seen.add(id(module.weight))
                layers.append(Layer(f"{at}.{kind}", index, kind, module, _name_pool(at, kind, lists)))
    if not layers:
        raise UserError("the model has no prunable linear layers inside decoder blocks")
    return layers


def list_readers(layers: Iterable[Layer]) -> list[Layer]:
    """The layers without those that are known to read what another one does before anything has run: up of experts."""
    return [layer for layer in layers if not (isinstance(layer.module, ExpertLinear) and layer.module.is_second)]


class Reach(NamedTuple):
    """How much of a model is prunable."""

    prunable: int
    """Weights of the layers that are."""
    blocks: int
    """All weights of matrices inside the decoder blocks."""
    model: int
    """All weights of the model, embeddings included."""
    dense: list[str]
    """Names of the matrices that pruning does not reach, `*` in place of a block's number; the largest first."""

    @property
    def of_blocks(self) -> float:
        """Share of the blocks' weights that is prunable: what a run goes by, however large the embeddings are."""
        return self.prunable / self.blocks

    @property
    def of_model(self) -> float:
        """Share of all weights that is prunable."""
        return self.prunable / self.model


def measure_reach(model: nn.Module, layers: Sequence[Layer]) -> Reach:
    """What of a model its prunable layers are; not reached are routers, odd projections, experts of unknown kinds."""
    blocks = find_blocks(model)
    prefix = name_blocks(model)
    reached = {id(layer.parameter) for layer in layers}
    inside = {name: p for name, p in blocks.named_parameters(prefix) if p.ndim >= 2 and not name.endswith("bias")}
    dense: dict[str, int] = {}
    for name, p in inside.items():
        if id(p) not in reached:
            merged = re.sub(r"^\.\d+", ".*", name.removeprefix(prefix))
            dense[f"{prefix}{merged}"] = dense.get(f"{prefix}{merged}", 0) + p.numel()
    return Reach(
        prunable=sum(layer.weight_OI.numel() for layer in layers),
        blocks=sum(p.numel() for p in inside.values()),
        model=sum(p.numel() for p in model.parameters()),
        dense=sorted(dense, key=lambda name: -dense[name]),
    )


def refuse_small_reach(reach: Reach, *, partial: bool) -> None:
    """Raises UserError where less than half of the blocks' weights is prunable and nobody said that this is meant."""
    if reach.of_blocks < LEAST_SHARE and not partial:
        named = ", ".join(reach.dense[:3]) + (", …" if len(reach.dense) > 3 else "")
        raise UserError(
            f"only {reach.of_blocks:.1%} of the weights in the model's blocks can be pruned ({reach.of_model:.1%} of "
            f"the whole model), not {named}; --partial prunes that share and leaves the rest dense"
        )


def _list_experts(module: nn.Module, block: int, at: str, kind: str) -> list[Layer]:
    return [
        Layer(f"{at}.{kind}.{expert}.{name}", block, f"{kind}.{name}", linear, f"{at}.{kind}.*.{name}")
        for expert, projections in enumerate(split_experts(module))
        for name, linear in projections.items()
    ]


def _find_experts(block: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Where the experts of a block are and how many: those that are modules of their own, and those that are stacked.

    Any parameter of three dimensions is taken for stacked experts, which may be of an unknown kind.
    """
    lists, stacks = {}, {}
    for name, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            forms = {tuple((n, p.shape) for n, p in expert.named_parameters()) for expert in module}
            if len(forms) == 1 and _count_weights(module):
                lists[name] = len(module)
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim == 3 and min(parameter.shape) > 1:
                stacks[name] = parameter.shape[0]
    return lists, stacks


def _name_pool(at: str, kind: str, lists: Iterable[str]) -> str:
    for place in lists:
        if kind.startswith(f"{place}."):
            _, _, rest = kind.removeprefix(f"{place}.").partition(".")
            return f"{at}.{place}.*.{rest}".rstrip(".")
    return ""


def _find_routers(block: nn.Module, experts: Mapping[str, int]) -> set[str]:
    """Linear layers that choose experts: beside these, not in attention, with as many outputs as there are."""
    routers = set()
    for place, count in experts.items():
        beside = place.rpartition(".")[0]
        for name, module in block.named_modules():
            is_beside = name.startswith(beside) and not name.startswith(f"{place}.")
            if is_beside and _count_outputs(module) == count and not is_in_attention(block, name):
                routers.add(name)
    return routers


def is_in_attention(block: nn.Module, name: str) -> bool:
    """Whether a module on the way to one of a block, by its name there, has a class of attention."""
    steps = name.split(".")
    way = (block.get_submodule(".".join(steps[:end])) for end in range(1, len(steps)))
    return any("attention" in type(module).__name__.lower() for module in way)


def _count_outputs(module: nn.Module) -> int:
    if not _weight_count(module):
        return 0
    return module.get_parameter("weight").shape[1 if isinstance(module, Conv1D) else 0]


def _count_weights(module: nn.Module) -> int:
    """Weights of linear layers in a module, fused experts included."""
    parts = list(module.modules())
    fused = (part for part in parts if is_fused(part))
    return sum(map(_weight_count, parts)) + sum(p.numel() for part in fused for p in list_stacked(part).values())


def _weight_count(module: nn.Module) -> int:
    if not isinstance(module, nn.Linear | Conv1D):
        return 0
    weight = module.weight
    return weight.numel() if weight.ndim == 2 and weight.is_floating_point() else 0
