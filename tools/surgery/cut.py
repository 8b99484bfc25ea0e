"""A decoder with fewer groups of attention heads, narrower MLPs or fewer blocks: what can be cut, and the model of it.

The cut model is a stock one: transformers makes it from a changed config and the weights that stay. The dense model
is never changed; what is not cut, both share.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tools.base.errors import UserError
from tools.models.layers import Layer, find_blocks, find_layers

Kind = Literal["heads", "neurons"]
KINDS: tuple[Kind, ...] = ("heads", "neurons")

_NEURONS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What configs call the width of their MLPs."""

STEP = 8
"""Neurons go in multiples of this where their number is one: GPUs multiply 16-bit matrices of other widths slowly."""


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
        bias = getattr(self.output.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


class Fit(NamedTuple):
    """What stays of one part."""

    part: Part
    units: Tensor
    """Ascending indices of the units that stay."""
    weight_OK: Tensor | None = None
    """The output projection fitted to the columns that stay; the dense columns where it is None."""
    bias_O: Tensor | None = None
    """Its bias, where it has one and was fitted."""


@dataclass(frozen=True)
class Counts:
    """How much goes: groups of heads and neurons of every block, and whole blocks."""

    heads: int = 0
    neurons: int = 0
    blocks: int = 0


@dataclass
class Cut:
    """What goes: the same number of units in every block, or whole blocks."""

    counts: Counts
    fits: list[Fit] = field(default_factory=list)
    dropped: tuple[int, ...] = ()
    """Blocks, ascending."""


def find_parts(model: Any, kind: Kind) -> list[Part]:
    """The heads or the neurons of every block. Raises UserError, in one line, when they cannot be cut."""
    check_alike(model)
    find = _find_heads if kind == "heads" else _find_neurons
    blocks = find_blocks(model)
    layers = find_layers(model)
    return [find(model, block, [x for x in layers if x.block == i]) for i, block in enumerate(blocks)]


def check_alike(model: Any) -> None:
    """Raises UserError when the blocks are not all of the same layers: one config could not describe the rest.

    Nor can blocks be cut that do not lie on one device.
    """
    shapes: list[list[tuple[str, torch.Size]]] = [[] for _ in find_blocks(model)]
    layers = find_layers(model)
    for layer in layers:
        shapes[layer.block].append((layer.kind, layer.weight_OI.shape))
    if len({layer.weight_OI.device for layer in layers}) > 1:
        raise UserError("only a model on one device can be cut; use another --device than spread")
    if any(block != shapes[0] for block in shapes):
        raise UserError(f"the blocks of {_name(model)} are not all alike; only models whose blocks are can be cut")


def _find_heads(model: Any, block: nn.Module, layers: list[Layer]) -> Part:
    attention = [layer for layer in layers if _in_attention(block, layer)]
    named = {layer.kind.rpartition(".")[2]: layer for layer in attention}
    inputs = tuple(named.pop(name) for name in ("q_proj", "k_proj", "v_proj") if name in named)
    if len(inputs) != 3 or len(named) != 1 or len(attention) != 4:
        kinds = ", ".join(layer.kind for layer in attention) or "no linear layers"
        raise UserError(
            f"the heads of {_name(model)} cannot be cut: its attention holds {kinds}, not q_proj, k_proj, v_proj and "
            "one output projection; its neurons or blocks may"
        )
    config = model.config.get_text_config()
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Part("heads", layers[0].block, groups, inputs, next(iter(named.values())))


def _find_neurons(model: Any, block: nn.Module, layers: list[Layer]) -> Part:
    mlp = [layer for layer in layers if not _in_attention(block, layer)]
    if len(mlp) < 2 or any(layer.weight_OI.shape != mlp[-1].weight_OI.T.shape for layer in mlp[:-1]):
        kinds = ", ".join(layer.kind for layer in mlp) or "no linear layers"
        raise UserError(
            f"the neurons of {_name(model)} cannot be cut: beside attention its blocks hold {kinds}, not projections "
            "up and one down; its heads or blocks may"
        )
    return Part("neurons", mlp[-1].block, mlp[-1].weight_OI.shape[1], tuple(mlp[:-1]), mlp[-1])


def _in_attention(block: nn.Module, layer: Layer) -> bool:
    """Whether a module on the way to the layer has a class of attention."""
    steps = layer.kind.split(".")
    modules = (block.get_submodule(".".join(steps[:end])) for end in range(1, len(steps)))
    return any("attention" in type(module).__name__.lower() for module in modules)


# --- how much ----------------------------------------------------------------------------------------------------


def list_counts(model: Any, kinds: Sequence[str], remove: float) -> list[Counts]:
    """What to take away so that `remove` of the weights of the blocks' linear layers goes, as nearly as units allow.

    `kinds` is blocks, or heads or neurons or both. Of both, heads take their own share, to the next number of groups
    below and above that the config accepts, and neurons the rest: up to two answers, for a measurement to choose from.
    Raises UserError when nothing or too much would go.
    """
    check_alike(model)
    if tuple(kinds) == ("blocks",):
        total = len(find_blocks(model))
        return [Counts(blocks=_nearest(remove, 1 / total, range(total), total))]
    weights = sum(layer.weight_OI.numel() for layer in find_layers(model) if layer.block == 0)
    parts = {kind: find_parts(model, kind)[0] for kind in KINDS if kind in kinds}
    shares = {kind: part.unit_weights / weights for kind, part in parts.items()}
    options = {kind: _options(model, part) for kind, part in parts.items()}
    if len(parts) == 1:
        return [Counts(**{k: _nearest(remove, shares[k], options[k], part.units) for k, part in parts.items()})]
    own, step = remove * parts["heads"].units, options["neurons"][1]
    below = max(n for n in options["heads"] if n <= own)
    found = []
    for heads in dict.fromkeys((below, min((n for n in options["heads"] if n >= own), default=below))):
        neurons = round((remove - heads * shares["heads"]) / shares["neurons"] / step) * step
        if neurons in options["neurons"] and heads + neurons:
            found.append(Counts(heads, neurons))
    if not found:
        most, least = sum(options[kind][-1] * shares[kind] for kind in parts), step * shares["neurons"]
        limit = (
            f"much to remove: {most:.2%} is the most"
            if remove > most
            else f"little to remove: {least:.2%} is the least"
        )
        raise UserError(f"{remove:g} is too {limit} that can go here")
    return found


def _options(model: Any, part: Part) -> Sequence[int]:
    """The numbers of units that may go, 0 among them."""
    if part.kind == "neurons":
        return range(0, part.units, math.gcd(part.units, STEP))
    return [n for n in range(part.units) if n == 0 or accepts(model, Counts(heads=n))]


def _nearest(remove: float, share: float, options: Sequence[int], units: int) -> int:
    """The number of units, of those that may go, nearest to the share to remove; `share` is that of one unit."""
    if len(options) == 1 or remove >= (options[-1] + units) / 2 * share:
        raise UserError(f"{remove:g} is too much to remove: {options[-1] * share:.2%} is the most that can go here")
    best = min(options, key=lambda n: abs(n * share - remove))
    if best == 0:
        raise UserError(f"{remove:g} is too little to remove: {options[1] * share:.2%} is the least that can go here")
    return best


# --- the config --------------------------------------------------------------------------------------------------


def cut_config(model: Any, counts: Counts, dropped: Sequence[int] = ()) -> Any:
    """The config of the cut model, checked by its own class. Raises ValueError when that refuses it."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # of the file that the weights were read from
        del config.quantization_config
    text = config.get_text_config()
    if counts.heads:
        part = find_parts(model, "heads")[0]
        heads = text.num_attention_heads
        text.head_dim = getattr(text, "head_dim", None) or part.output.weight_OI.shape[1] // heads
        if getattr(text, "num_key_value_heads", None):
            text.num_key_value_heads = part.units - counts.heads
        text.num_attention_heads = heads // part.units * (part.units - counts.heads)
    if counts.neurons:
        part = find_parts(model, "neurons")[0]
        name = next((name for name in _NEURONS if hasattr(text, name)), None)
        if name is None:
            raise ValueError("it has no field for the width of the MLPs")
        setattr(text, name, part.units - counts.neurons)
    if counts.blocks:
        _cut_lists(text, dropped)
        text.num_hidden_layers -= counts.blocks
    return type(config).from_dict(config.to_dict())


def _cut_lists(config: Any, dropped: Sequence[int]) -> None:
    """Take the dropped blocks out of lists with one entry a block, such as `layer_types`."""
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, [entry for i, entry in enumerate(value) if i not in dropped])


def accepts(model: Any, counts: Counts) -> bool:
    """Whether the architecture's config takes these counts, as far as the config itself can tell."""
    try:
        cut_config(model, counts)
    except Exception:  # every config has checks, and errors, of its own
        return False
    return True


def check_buildable(model: Any, counts: Counts) -> None:
    """Raises UserError, before anything is measured, when the architecture has no model of the cut shapes."""
    dropped = tuple(range(counts.blocks))
    parts = [part for kind in KINDS if getattr(counts, kind) for part in find_parts(model, kind)]
    fits = [Fit(part, torch.arange(part.units - getattr(counts, part.kind))) for part in parts]
    wanted = cut_state(model, Cut(counts, fits, dropped), on_meta=True)
    try:
        config = cut_config(model, counts, dropped)
        with torch.device("meta"):
            built = type(model)(config).state_dict()
    except Exception as error:  # every architecture has checks, and errors, of its own
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{_name(model)} takes no such cut: {line}") from error
    for name in sorted(wanted.keys() | built.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (wanted, built)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{_name(model)} takes no such cut: its config has no way to say that {name} is {shapes[0]}, "
                f"not {shapes[1]}; other parts may be cut"
            )


# --- the weights -------------------------------------------------------------------------------------------------


def cut_state(model: Any, cut: Cut, *, on_meta: bool = False) -> dict[str, Tensor]:
    """The cut model's state dict; what is not cut is not copied. With `on_meta` only shapes are made."""
    state: dict[str, Tensor] = {name: t.to("meta") if on_meta else t for name, t in model.state_dict().items()}
    for fit in cut.fits:
        _cut_part(state, fit)
    if cut.dropped:
        state = _renumber(model, state, cut.dropped)
    return state


def _cut_part(state: dict[str, Tensor], fit: Fit) -> None:
    part = fit.part
    for layer in (*part.inputs, part.output) if len(fit.units) < part.units else ():
        name = f"{layer.name}.weight"
        dim = 0 if layer is not part.output else 1
        if isinstance(layer.module, Conv1D):  # stored as d_in x d_out
            dim = 1 - dim
        state[name] = _select(state[name], fit.units, part.units, dim)
        if layer is not part.output and f"{layer.name}.bias" in state:
            state[f"{layer.name}.bias"] = _select(state[f"{layer.name}.bias"], fit.units, part.units, 0)
    if fit.weight_OK is not None:
        transposed = isinstance(part.output.module, Conv1D)
        state[f"{part.output.name}.weight"] = (fit.weight_OK.T if transposed else fit.weight_OK).contiguous()
    if fit.bias_O is not None:
        state[f"{part.output.name}.bias"] = fit.bias_O


def _select(tensor: Tensor, kept: Tensor, units: int, dim: int) -> Tensor:
    """The runs of some units along one dimension, which holds `units` equal runs."""
    runs = tensor.unflatten(dim, (units, -1))
    selected: Tensor = runs.index_select(dim, kept.to(tensor.device)).flatten(dim, dim + 1)
    return selected


def _renumber(model: Any, state: Mapping[str, Tensor], dropped: Sequence[int]) -> dict[str, Tensor]:
    blocks = find_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks) + "."
    stays = [i for i in range(len(blocks)) if i not in dropped]
    new = {str(old): str(index) for index, old in enumerate(stays)}
    result = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            result[name] = tensor
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        if index in new:
            result[f"{prefix}{new[index]}.{rest}"] = tensor
    return result


def build_cut(model: Any, cut: Cut) -> Any:
    """The cut model, as transformers itself loads it: eval mode, weights frozen, on the dense model's device."""
    config = cut_config(model, cut.counts, cut.dropped)
    loaded: Any = type(model).from_pretrained(
        None, config=config, state_dict=cut_state(model, cut), dtype=model.dtype, output_loading_info=True
    )
    built, loading = loaded
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[kind]]
    assert not wrong, wrong  # `check_buildable` compared all shapes
    built.generation_config = copy.deepcopy(model.generation_config)
    return built.to(model.device).eval().requires_grad_(False)


def without_fits(cut: Cut) -> Cut:
    """The same cut, with dense weights where they stay."""
    return replace(cut, fits=[Fit(fit.part, fit.units) for fit in cut.fits])


def count_weights(model: Any) -> int:
    """Weights of the blocks' linear layers: what shares to remove are shares of."""
    return sum(layer.weight_OI.numel() for layer in find_layers(model))


def _name(model: Any) -> str:
    return type(model).__name__
