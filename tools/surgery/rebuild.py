"""The model with fewer groups of attention heads, narrower MLPs or fewer blocks.

It is a stock one: transformers makes it from a changed config and the weights that stay. The dense model is never
changed; what is not cut, both share.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from billhook_kernels.channels import expand_units
from tools.base.errors import UserError, in_one_line
from tools.models.blocks import Blocks
from tools.models.layers import find_blocks, name_blocks
from tools.models.readout import compute_hidden
from tools.models.spread import find_places, spread_beside
from tools.models.streamed import find_stream, stream_beside
from tools.plans.cuts import Counts
from tools.surgery.blocks import skipping
from tools.surgery.parts import KINDS, Cut, Fit, find_parts

_NEURONS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What configs call the width of their MLPs."""

TOLERANCE = 0.05
"""Of the length of what a block adds to the hidden states: another function of the weights is not as near."""


def copy_sharing(model: Any) -> Any:
    """A copy that shares every weight with the model, for hooks of its own."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


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


_NUMBERED = ("mlp_only_layers", "moe_layers", "cross_attention_layers")
"""Lists of configs that name blocks by their numbers."""


def _cut_lists(config: Any, dropped: Sequence[int]) -> None:
    """Take the dropped blocks out of lists with one entry a block, such as `layer_types`, and of lists that name some,
    which go by other numbers then."""
    stays = [block for block in range(config.num_hidden_layers) if block not in dropped]
    new = {block: number for number, block in enumerate(stays)}
    for name, value in vars(config).items():
        if name in _NUMBERED and isinstance(value, list):
            setattr(config, name, [new[block] for block in value if block in new])
        elif "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[block] for block in stays])


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
        raise UserError(f"{type(model).__name__} takes no such cut: {in_one_line(error, 200)}") from error
    for name in sorted(wanted.keys() | built.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (wanted, built)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{type(model).__name__} takes no such cut: its config has no way to say that {name} is {shapes[0]}, "
                f"not {shapes[1]}; other parts may be cut"
            )


# --- the weights -------------------------------------------------------------------------------------------------


def cut_state(model: Any, cut: Cut, *, on_meta: bool = False) -> dict[str, Tensor]:
    """The cut model's state dict; what is not cut is not copied. With `on_meta` only shapes are made."""
    return dict(_list_state(model, cut, on_meta=on_meta))


def _list_state(model: Any, cut: Cut, *, on_meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of `cut_state`, each made as it comes."""
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for fit in cut.fits:
        edits |= _list_edits(fit)
    rename = _number_anew(model, cut.dropped)
    for name, tensor in model.state_dict().items():
        if new := rename(name):
            given = tensor.to("meta") if on_meta else tensor
            yield new, edits[name](given) if name in edits else given


def _list_edits(fit: Fit) -> dict[str, Callable[[Tensor], Tensor]]:
    """What a part that is cut makes of the dense tensors, by their names."""
    part, edits = fit.part, dict[str, Callable[[Tensor], Tensor]]()
    for layer in (*part.inputs, part.output) if len(fit.units) < part.units else ():
        dim = 0 if layer is not part.output else 1
        stored = 1 - dim if isinstance(layer.module, Conv1D) else dim  # as d_in x d_out
        edits[f"{layer.name}.weight"] = partial(_select, kept=fit.units, units=part.units, dim=stored)
        if layer is not part.output:
            edits[f"{layer.name}.bias"] = partial(_select, kept=fit.units, units=part.units, dim=0)
    if (weight_OK := fit.weight_OK) is not None:
        stored_weight = weight_OK.T if isinstance(part.output.module, Conv1D) else weight_OK
        edits[f"{part.output.name}.weight"] = lambda _: stored_weight.contiguous()
    if (bias_O := fit.bias_O) is not None:
        edits[f"{part.output.name}.bias"] = lambda _: bias_O
    return edits


def _select(tensor: Tensor, kept: Tensor, units: int, dim: int) -> Tensor:
    """The runs of some units along one dimension, which holds `units` equal runs."""
    runs = tensor.unflatten(dim, (units, -1))
    selected: Tensor = runs.index_select(dim, kept.to(tensor.device)).flatten(dim, dim + 1)
    return selected


def _number_anew(model: Any, dropped: Sequence[int]) -> Callable[[str], str | None]:
    """A tensor's name, or a module's, without the dropped blocks; None of what goes with one."""
    blocks = find_blocks(model)
    prefix = f"{name_blocks(model)}."
    stays = [i for i in range(len(blocks)) if i not in dropped]
    new = {str(old): str(index) for index, old in enumerate(stays)}

    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return name
        index, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{new[index]}{dot}{rest}" if index in new else None

    return rename


def build_cut(model: Any, cut: Cut) -> Any:
    """The cut model, as transformers itself loads it: eval mode, weights frozen, on the dense model's device.

    Of a model that is streamed, or laid over several devices, so is the cut one. Raises DiskFull.
    """
    config, stream = cut_config(model, cut.counts, cut.dropped), find_stream(model)

    def build(state: Mapping[str, Tensor]) -> Any:
        loaded: Any = type(model).from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype, output_loading_info=True
        )
        built, loading = loaded
        wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[kind]]
        assert not wrong, wrong  # `check_buildable` compared all shapes
        built.generation_config = copy.deepcopy(model.generation_config)
        return built.eval().requires_grad_(False)

    if places := find_places(model):
        return spread_beside(places, build(cut_state(model, cut)), _number_anew(model, cut.dropped))
    if stream is None:
        return build(cut_state(model, cut)).to(model.device)
    first = _find_tied(model, cut)
    return stream_beside(
        stream,
        lambda mapped: build({name: mapped[same] for name, same in first.items()}),
        ((name, tensor) for name, tensor in _list_state(model, cut) if first[name] == name),
    )


def _find_tied(model: Any, cut: Cut) -> dict[str, str]:
    """Of every name in the cut model's state dict the first one of the same dense tensor."""
    first: dict[tuple[int, torch.Size], str] = {}
    rename = _number_anew(model, cut.dropped)
    named = ((rename(name), tensor) for name, tensor in model.state_dict().items())
    return {new: first.setdefault((tensor.data_ptr(), tensor.shape), new) for new, tensor in named if new}


# --- whether it is right -----------------------------------------------------------------------------------------


@torch.no_grad()
def check_cut(dense: Any, cut: Cut, model: Any, ids_T: Tensor) -> None:
    """Compare the cut model, not fitted, with the dense one without what went, block by block: rounding grows on its
    way through a model that lost much. Raises UserError where they differ.

    They do when an architecture orders its heads, or treats its blocks, in a way that is not known here.
    """
    theirs, ours = Blocks(dense), Blocks(model)
    with masked(cut.fits), skipping(theirs, cut.dropped), theirs.only(0, len(theirs), ids_T) as states:
        read_BTD = compute_hidden(dense, ids_T[None])
    entered = [states[block] for block in range(len(theirs)) if block not in cut.dropped]
    rounding = 4 * torch.finfo(model.dtype).eps
    for block, x_BTD in enumerate(entered):
        last = block == len(entered) - 1
        found_BTD = ours.run_to_head(ids_T, block, x_BTD).float()
        expected_BTD = (read_BTD if last else entered[block + 1]).to(found_BTD)
        added_BTD = expected_BTD if last else expected_BTD - x_BTD.to(found_BTD)
        limit = TOLERANCE * added_BTD.norm() + rounding * expected_BTD.norm()
        if not bool((found_BTD - expected_BTD).norm() <= limit):
            raise UserError(
                f"the cut {type(model).__name__} does not compute what the dense one does without what was cut; "
                "this architecture is not supported"
            )


@contextmanager
def masked(fits: Sequence[Fit]) -> Iterator[None]:
    """Inside, what goes is zero where the output projections read it."""
    with ExitStack() as undo:
        for part, units, *_ in fits:
            stays_I = mark_channels(units, part.units, part.output.weight_OI[0])
            undo.callback(part.output.module.register_forward_pre_hook(mask_input(stays_I)).remove)
        yield


def mark_channels(units: Tensor, total: int, like_N: Tensor) -> Tensor:
    """1 for the channels of some of `total` units, 0 for the others: shape, dtype and device of `like_N`."""
    stays_N = torch.zeros_like(like_N)
    stays_N[expand_units(units, len(like_N) // total)] = 1
    return stays_N


def mask_input(stays_I: Tensor) -> Callable[..., tuple[Tensor]]:
    """A hook before a layer, wherever it runs: what it reads of the channels that do not stay is zero."""
    return lambda _module, inputs: (inputs[0] * stays_I.to(inputs[0].device),)
