"""SliceGPT (arXiv 2401.15024) as its authors run it (github.com/microsoft/TransformerCompression, rotate_and_slice).

The hidden width shrinks: between attention, MLP and blocks only the principal components of what passes there stay. No
stock config has the rotations between them, which are matrices of their own: the model is a copy with hooks that
projects in the full width, which computes what the narrow one would. x Q has the length of x, so that RMSNorm, whose
weights go into the layers behind it, gives the same.

- Principal components are those of the sum of x xᵀ, uncentred, in fp64, with a hundredth of its mean diagonal added;
  of the embeddings first, then in each block of what is added up behind attention and behind the MLP, each behind all
  that was sliced before it. As in the authors' code nothing is sliced before the head.
- Widths are multiples of 8, the authors' `--round-interval`.
- What goes is counted of the whole model: the narrow one's rotations are weights, and its head is no longer tied to
  its embeddings.
- The text is the caller's. The authors take 1,024 windows of 2,048 tokens of Alpaca, or of WikiText-2.

Shape suffixes: B windows, T tokens, D hidden width, K components that stay.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.models.blocks import Blocks, give_hidden, take_hidden
from tools.models.layers import find_blocks
from tools.surgery.moments import kept_outputs
from tools.surgery.parts import Part, count_weights, find_parts
from tools.surgery.rebuild import copy_sharing

INTERVAL = 8
"""Widths are multiples of it."""
DAMPING = 0.01
"""Of the mean diagonal, added to it."""
TOLERANCE = 0.02
"""How far a block may be from its input and the two outputs added up, as a share of its output's length."""


class Sliced(NamedTuple):
    """What stays of the hidden states."""

    embedded_DK: Tensor
    """Components of what the embeddings give; like the others orthonormal, in fp32."""
    attended: list[Tensor]
    """By block: those of what is added up behind attention, (D, K)."""
    passed: list[Tensor]
    """By block but the last: those of what it passes on, (D, K)."""
    removed: float
    """Weights of the whole model that go, as a share of those of the blocks' linear layers."""


@torch.no_grad()
def slice_states(model: Any, remove: float, windows_BT: Tensor, progress: Progress) -> Sliced:
    """What stays so that as many weights go as are `remove` of those of the blocks' linear layers, to a width.

    Raises UserError where blocks are none that add up attention and MLP behind RMSNorm, or what passes is not finite.
    """
    outputs = _find_outputs(model)
    blocks = Blocks(model)
    width, removed = _choose_width(model, remove)
    states = [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
    _check_sums(blocks, outputs, windows_BT[0], states[0])
    embedded_DK = _find_components(states, width)
    states = [_project(x_BTD, embedded_DK) for x_BTD in states]
    attended, passed = [], []
    for block, (attention, _) in enumerate(outputs):
        progress("slice", block, len(blocks))
        middle = []
        for ids_T, x_BTD in zip(windows_BT, states, strict=True):
            with kept_outputs([attention]) as outputs_of:
                blocks.run(ids_T, block, x_BTD.to(ids_T.device))
            middle.append(x_BTD + outputs_of[0].view(x_BTD.shape).cpu())
        attended.append(_find_components(middle, width))
        there: list[Tensor] = []
        hook = attention.output.module.register_forward_hook(_adding_up(there, attended[-1]))
        for i, ids_T in enumerate(windows_BT):
            there[:] = [states[i].to(ids_T.device)]
            states[i] = blocks.run(ids_T, block, there[0]).cpu()
        hook.remove()
        if block < len(blocks) - 1:
            passed.append(_find_components(states, width))
            states = [_project(x_BTD, passed[-1]) for x_BTD in states]
    progress("slice", len(blocks), len(blocks))
    return Sliced(embedded_DK, attended, passed, removed)


def build_sliced(model: Any, sliced: Sliced) -> Any:
    """The model as it is behind the slices: a copy that shares every weight with it, with hooks."""
    built = copy_sharing(model)
    blocks = find_blocks(built)
    for block, (attention, mlp) in enumerate(_find_outputs(built)):
        there: list[Tensor] = []
        first_DK = None if block else sliced.embedded_DK
        blocks[block].register_forward_pre_hook(_entering(there, first_DK), with_kwargs=True)
        attention.output.module.register_forward_hook(_adding_up(there, sliced.attended[block]))
        if block < len(sliced.passed):
            mlp.output.module.register_forward_hook(_adding_up(there, sliced.passed[block]))
    return built


def count_sliced(model: Any, widths: Sequence[int]) -> dict[int, int]:
    """Parameters of the narrow model of every width: layers in and out of it, two rotations a block, embeddings and a
    head. Vectors are not counted: the norms' weights go into the layers.
    """
    config, blocks = model.config.get_text_config(), find_blocks(model)
    hidden, words = int(config.hidden_size), int(config.vocab_size)
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim > 1)
    down = _find_outputs(model)[-1][1].output.weight_OI.numel()  # whose outputs all stay, before the head
    counts = {}
    for width in widths:
        layers = (matrices - down) * width // hidden + down
        rotations = (2 * len(blocks) - 1) * width * width + width * hidden
        counts[width] = layers + rotations + words * width + words * hidden
    return counts


def _choose_width(model: Any, remove: float) -> tuple[int, float]:
    """(the width by which what goes is nearest to the share, which share that is)."""
    whole, inside = sum(parameter.numel() for parameter in model.parameters()), count_weights(model)
    sizes = count_sliced(model, range(INTERVAL, model.config.get_text_config().hidden_size, INTERVAL))
    smaller = {width: (whole - size) / inside for width, size in sizes.items() if size < whole}
    if not smaller:
        raise UserError(
            f"SliceGPT makes no smaller {type(model).__name__} of this one: it adds rotations, and a head of its own"
        )
    width = min(smaller, key=lambda width: abs(smaller[width] - remove))
    return width, smaller[width]


def _find_outputs(model: Any) -> list[tuple[Part, Part]]:
    """The output projections of attention and MLP, by block. Raises UserError where norms are no RMSNorm."""
    if any(isinstance(module, nn.LayerNorm) for block in find_blocks(model) for module in block.modules()):
        raise UserError(f"{type(model).__name__} has LayerNorm in its blocks; SliceGPT is here for RMSNorm alone")
    return list(zip(find_parts(model, "heads"), find_parts(model, "neurons"), strict=True))


def _check_sums(blocks: Blocks, outputs: Sequence[tuple[Part, Part]], ids_T: Tensor, x_BTD: Tensor) -> None:
    """Raises UserError where a block is not its input and the outputs of both projections, added up."""
    with kept_outputs(outputs[0]) as found:
        y_BTD = blocks.run(ids_T, 0, x_BTD)
    sum_BTD = x_BTD.to(y_BTD.device).float() + sum(output.float().view_as(y_BTD) for output in found.values())
    if not float((sum_BTD - y_BTD.float()).norm()) <= TOLERANCE * float(y_BTD.float().norm()):
        raise UserError(
            f"the blocks of {type(blocks.model).__name__} do not add up what attention and MLP give; SliceGPT cannot "
            "slice them"
        )


def _find_components(states: Sequence[Tensor], width: int) -> Tensor:
    """The first principal components of all tokens, (D, K), orthonormal, in fp32. Raises UserError."""
    moment_DD = torch.zeros(states[0].shape[-1], states[0].shape[-1], dtype=torch.float64)
    for x_BTD in states:
        x_TD = x_BTD.double().flatten(0, -2)
        moment_DD += x_TD.T @ x_TD
    if not bool(torch.isfinite(moment_DD).all()):
        raise UserError("what passes between the blocks is not finite on the calibration text; try --dtype fp32")
    moment_DD.diagonal().add_(DAMPING * moment_DD.diagonal().mean())
    components_DD: Tensor = torch.linalg.eigh(moment_DD).eigenvectors
    return components_DD.flip(1)[:, :width].float()


def _project(x_BTD: Tensor, components_DK: Tensor) -> Tensor:
    """Onto the components, in the dtype of the states."""
    components_DK = components_DK.to(x_BTD.device)
    return ((x_BTD.float() @ components_DK) @ components_DK.T).to(x_BTD.dtype)


def _entering(there: list[Tensor], components_DK: Tensor | None) -> Callable[..., Any]:
    """A hook that keeps what a block reads, and projects it first unless there are no components."""

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x_BTD = take_hidden(args, kwargs)
        there[:] = [x_BTD if components_DK is None else _project(x_BTD, components_DK)]
        return give_hidden(there[0], args, kwargs)

    return enter


def _adding_up(there: list[Tensor], components_DK: Tensor) -> Callable[..., Tensor]:
    """A hook that has an output become what must be added to what is `there` so that the sum is its projection.

    That sum is what is there afterwards.
    """

    def give(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        [x_BTD] = there
        sum_BTD = _project(x_BTD.float() + output.view_as(x_BTD).float(), components_DK)
        added_BTD = (sum_BTD - x_BTD.float()).to(output.dtype)
        there[:] = [x_BTD + added_BTD]
        return added_BTD.view_as(output)

    return give
