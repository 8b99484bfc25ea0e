"""What of a decoder can be cut: the groups of attention heads and the neurons of its blocks; and what of it stays."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from tools.base.errors import UserError
from tools.models.layers import Layer, find_blocks, find_layers, is_in_attention
from tools.models.spread import find_places
from tools.models.streamed import find_stream
from tools.plans.cuts import Counts

Kind = Literal["heads", "neurons"]
KINDS: tuple[Kind, ...] = ("heads", "neurons")

NEEDS_WHOLE = "needs the whole model on one device; use another --device than stream or spread"
"""Why something is not done to a model that is not, behind its name."""


@dataclass(frozen=True)
class Part:
    """The channels between two sets of linear layers of a block: rows of `inputs`, columns of `output`.

    Unit u of U owns the u-th of U equal runs of them: a neuron, or a KV head with the query heads that read it.
    """

    kind: Kind
    block: int
    units: int
    inputs: tuple[Layer, ...]
    output: Layer

    @property
    def unit_weights(self) -> int:
        """Weights that go with one unit."""
        return sum(layer.weight_OI.numel() for layer in (*self.inputs, self.output)) // self.units

    @property
    def bias(self) -> Tensor | None:
        """The bias of the output projection, if it has one."""
        return self.output.bias_O


class Fit(NamedTuple):
    """What stays of one part."""

    part: Part
    units: Tensor
    """Ascending indices of the units that stay."""
    weight_OK: Tensor | None = None
    """The output projection fitted to the columns that stay; the dense columns where it is None."""
    bias_O: Tensor | None = None
    """Its bias, where it has one and was fitted."""


@dataclass
class Cut:
    """What goes: the same number of units in every block, or whole blocks."""

    counts: Counts
    fits: list[Fit] = field(default_factory=list)
    dropped: tuple[int, ...] = ()
    """Blocks, ascending."""


def without_fits(cut: Cut) -> Cut:
    """The same cut, with dense weights where they stay."""
    return replace(cut, fits=[Fit(fit.part, fit.units) for fit in cut.fits])


def count_weights(model: Any) -> int:
    """Weights of the blocks' linear layers: what shares to remove are shares of."""
    return sum(layer.weight_OI.numel() for layer in find_layers(model))


def convert_size(model: Any, size: float) -> tuple[float, float]:
    """(the share of the blocks' linear weights that goes where `size` of the model's bytes stays, 1 or more where that
    cannot be; the share of the bytes that are none of theirs, and stay).
    """
    whole = sum(parameter.nbytes for parameter in model.parameters())
    inside = sum(layer.weight_OI.nbytes for layer in find_layers(model))
    return (1 - size) * whole / inside, 1 - inside / whole


def find_parts(model: Any, kind: Kind) -> list[Part]:
    """The heads or the neurons of every block. Raises UserError, in one line, when they cannot be cut."""
    find = _find_heads if kind == "heads" else _find_neurons
    return [find(model, block, layers) for block, layers in zip(find_blocks(model), check_alike(model), strict=True)]


def check_alike(model: Any) -> list[list[Layer]]:
    """The layers of each block. Raises UserError when these are not the same in all: one config could not describe the
    rest.
    """
    grouped: list[list[Layer]] = [[] for _ in find_blocks(model)]
    for layer in find_layers(model):
        grouped[layer.block].append(layer)
    shapes = [[(layer.kind, layer.weight_OI.shape) for layer in block] for block in grouped]
    if any(block != shapes[0] for block in shapes):
        raise UserError(
            f"the blocks of {type(model).__name__} are not all alike; only models whose blocks are can be cut"
        )
    return grouped


def is_whole(model: Any) -> bool:
    """Whether a model is held on one device: it is neither streamed nor laid over several."""
    return find_stream(model) is None and find_places(model) is None


def refuse_apart(model: Any, what: str) -> None:
    """Raises UserError, in one line, where a model is not whole and `what` cannot be done to such a one."""
    if not is_whole(model):
        raise UserError(f"{what} {NEEDS_WHOLE}")


def _find_heads(model: Any, block: nn.Module, layers: list[Layer]) -> Part:
    attention = [layer for layer in layers if is_in_attention(block, layer.kind)]
    named = {layer.kind.rpartition(".")[2]: layer for layer in attention}
    inputs = tuple(named.pop(name) for name in ("q_proj", "k_proj", "v_proj") if name in named)
    if len(inputs) != 3 or len(named) != 1 or len(attention) != 4:
        kinds = ", ".join(layer.kind for layer in attention) or "no linear layers"
        raise UserError(
            f"the heads of {type(model).__name__} cannot be cut: its attention holds {kinds}, not q_proj, k_proj, "
            "v_proj and one output projection; its neurons or blocks may"
        )
    config = model.config.get_text_config()
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Part("heads", layers[0].block, groups, inputs, next(iter(named.values())))


def _find_neurons(model: Any, block: nn.Module, layers: list[Layer]) -> Part:
    mlp = [layer for layer in layers if not is_in_attention(block, layer.kind)]
    if len(mlp) < 2 or any(layer.pool or layer.weight_OI.shape != mlp[-1].weight_OI.T.shape for layer in mlp[:-1]):
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in mlp)) or "no linear layers"
        raise UserError(
            f"the neurons of {type(model).__name__} cannot be cut: beside attention its blocks hold {kinds}, not "
            "projections up and one down; its heads or blocks may"
        )
    return Part("neurons", mlp[-1].block, mlp[-1].weight_OI.shape[1], tuple(mlp[:-1]), mlp[-1])
