"""Which heads, neurons or blocks go, and the least-squares fit of what stays; from real forwards of the dense model.

Shape suffixes: B windows, T tokens, I input channels of an output projection.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.channels import (
    InputMoments,
    MomentSums,
    expand_units,
    fit_kept,
    keep_highest_units,
    score_fluctuation,
    score_residual,
)
from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.models.blocks import Blocks
from tools.models.readout import compute_hidden, measure_losses
from tools.surgery.cut import KINDS, Counts, Cut, Fit, Part, find_parts

SEARCH_TOKENS = 1024
"""Calibration tokens, in whole windows, on which whole cuts are compared: a KL is paired, so that few will do."""
TOLERANCE = 0.05
"""Of the length of the hidden states: rounding in bf16 stays below, another function of the weights does not."""


def fit_part(part: Part, moments: InputMoments, removed: int, *, refit: bool = True) -> Fit:
    """Take the lowest-scored units away and, with `refit`, fit the output projection to the rest.

    Neurons are scored by FLAP's fluctuation, groups of heads by what the fit cannot restore. Measured on SmolLM2-135M:
    with one of three groups gone from every block, the mean fluctuation of a group's channels left perplexity 38.2
    after the fit, the residual 31.7 (dense 24.5); among neurons the residual was no better than the fluctuation.
    """
    weight_OI = part.output.weight_OI
    if part.kind == "heads":
        score_U = score_residual(weight_OI, moments, part.units, biased=part.bias is not None)
    else:
        score_U = score_fluctuation(weight_OI, moments)
    units = keep_highest_units(score_U, removed)
    if not refit:
        return Fit(part, units)
    kept_K = expand_units(units, weight_OI.shape[1] // part.units)
    return Fit(part, units, *fit_kept(weight_OI, part.bias, moments, kept_K))


@torch.no_grad()
def choose_channels(
    model: Any, candidates: Sequence[Counts], windows_BT: Tensor, progress: Progress, *, refit: bool = True
) -> list[Cut]:
    """A cut for each of the counts; one walk over the calibration windows, block after block.

    No more is held than the inputs of one block (on CPU) and the moments of what its output projections read.
    """
    blocks = Blocks(model)
    parts = [find_parts(model, kind) for kind in KINDS if any(getattr(counts, kind) for counts in candidates)]
    cuts = [Cut(counts) for counts in candidates]
    states = [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
    for block, members in enumerate(zip(*parts, strict=True)):
        progress("choose and fit", block, len(blocks))
        sums = [MomentSums(part.output.weight_OI.shape[1], windows_BT.device) for part in members]
        with _tapped(members, [s.add for s in sums]):
            states = [
                blocks.run(ids_T, block, x.to(ids_T.device)).cpu() for ids_T, x in zip(windows_BT, states, strict=True)
            ]
        for part in members:
            moments = _finish(sums.pop(0), part)
            fits = {
                n: fit_part(part, moments, n, refit=refit) for n in {getattr(c, part.kind) for c in candidates} if n
            }
            for cut in cuts:
                if removed := getattr(cut.counts, part.kind):
                    cut.fits.append(fits[removed])
    progress("choose and fit", len(blocks), len(blocks))
    return cuts


def _finish(sums: MomentSums, part: Part) -> InputMoments:
    try:
        return sums.finish()
    except ValueError as error:
        raise UserError(f"{part.output.name}: {error} on the calibration text; try --dtype fp32 or bf16") from error


@contextmanager
def _tapped(parts: Sequence[Part], see: Sequence[Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside, each function is shown what the output projection of its part reads, (T, I)."""
    with ExitStack() as undo:
        for part, show in zip(parts, see, strict=True):
            undo.callback(part.output.module.register_forward_pre_hook(_showing(show)).remove)
        yield


def _showing(show: Callable[[Tensor], None]) -> Callable[..., None]:
    return lambda _module, inputs: show(inputs[0].flatten(0, -2))


# --- whole blocks ------------------------------------------------------------------------------------------------


@torch.no_grad()
def choose_blocks(model: Any, count: int, windows_BT: Tensor, progress: Progress) -> tuple[list[int], int]:
    """(blocks to drop, in the order in which they went; tokens put through models without some block).

    Each time the one goes without which the KL is lowest.

    Measured against the dense model on the first SEARCH_TOKENS. A block that cost more when fewer were gone than the
    best one costs now is not measured again; what runs below a block is not run again to measure it.
    """
    blocks = Blocks(model)
    windows_BT = search_windows(windows_BT)
    dense = [compute_hidden(model, ids_T[None])[0] for ids_T in windows_BT]
    dropped: list[int] = []
    costs = dict.fromkeys(range(len(blocks)), 0.0)
    tokens = 0
    for done in range(count):
        inputs = [_read_inputs(blocks, dropped, ids_T) for ids_T in windows_BT]
        best = math.inf
        for i, block in enumerate(sorted(costs, key=costs.__getitem__)):
            progress("search blocks", done * len(blocks) + i, count * len(blocks))
            if costs[block] > best:
                break
            tokens += windows_BT.numel()
            kl = 0.0
            for ids_T, dense_TD, boundary in zip(windows_BT, dense, inputs, strict=True):
                with skipping(blocks, [*dropped, block]), blocks.only(block, len(blocks), ids_T, boundary[block]):
                    kl += measure_losses(model, ids_T, dense_TD)[0].kl
            costs[block] = kl if math.isfinite(kl) else math.inf
            best = min(best, costs[block])
        dropped.append(min(costs, key=costs.__getitem__))
        del costs[dropped[-1]]
    progress("search blocks", 1, 1)
    return dropped, tokens


def _read_inputs(blocks: Blocks, dropped: Sequence[int], ids_T: Tensor) -> dict[int, Tensor]:
    """What each block reads when the dropped ones are skipped."""
    with skipping(blocks, dropped), blocks.only(0, len(blocks), ids_T) as boundary:
        compute_hidden(blocks.model, ids_T[None])
    return boundary


@torch.no_grad()
def fold_blocks(model: Any, dropped: Sequence[int], windows_BT: Tensor, progress: Progress) -> list[Fit]:
    """What makes up for dropped blocks: the MLP's output projection of each block that stays just before some.

    It is fitted to give, beside its own output, what the dropped blocks added in the dense model. Empty where the
    blocks have no such projection, or do not simply add its output to their own. Nothing precedes a first block.
    """
    blocks = Blocks(model)
    try:
        parts = find_parts(model, "neurons")
    except UserError:
        return []
    if not _adds_output(blocks, parts[0], windows_BT[0]):
        return []
    fits, states = [], [blocks.embed(ids_T).cpu() for ids_T in windows_BT]
    for first, end in _segments(len(blocks), dropped):
        progress("fold blocks", first, len(blocks))
        sums = MomentSums(parts[0].output.weight_OI.shape[1], windows_BT.device)
        for i, ids_T in enumerate(windows_BT):
            read: list[Tensor] = []
            with _tapped(parts[first : first + 1], [read.append]):
                own_BTD = hidden_BTD = blocks.run(ids_T, first, states[i].to(ids_T.device))
            for block in range(first + 1, end):
                hidden_BTD = blocks.run(ids_T, block, hidden_BTD)
            states[i] = hidden_BTD.cpu()
            if end > first + 1 and first not in dropped:
                sums.add(read[0], (hidden_BTD.float() - own_BTD.float())[0])
        if sums.tokens:
            part = parts[first]
            every_U = torch.arange(part.units, device=windows_BT.device)
            fitted = fit_kept(part.output.weight_OI, part.bias, _finish(sums, part), every_U)
            fits.append(Fit(part, every_U, *fitted))
    progress("fold blocks", len(blocks), len(blocks))
    return fits


def _segments(count: int, dropped: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of each block that stays with the dropped ones after it, and of dropped ones before all others."""
    starts = [block for block in range(count) if block == 0 or block not in dropped]
    return pairwise([*starts, count])


def _adds_output(blocks: Blocks, part: Part, ids_T: Tensor) -> bool:
    """Whether a block gives its MLP's output projection's output plus something else: not so if a norm comes after."""
    outputs: list[Tensor] = []
    embedded_BTD = blocks.embed(ids_T)
    hook = part.output.module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    once_BTD = blocks.run(ids_T, part.block, embedded_BTD)
    hook.remove()
    hook = part.output.module.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    twice_BTD = blocks.run(ids_T, part.block, embedded_BTD)
    hook.remove()
    added_BTD = outputs[0].view_as(once_BTD)
    return bool((twice_BTD - once_BTD - added_BTD).float().norm() < 0.5 * added_BTD.float().norm())


@contextmanager
def skipping(blocks: Blocks, dropped: Sequence[int]) -> Iterator[None]:
    """Inside, the dropped blocks run, but pass their input on."""

    def pass_on(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    with ExitStack() as undo:
        for block in dropped:
            undo.callback(blocks.modules[block].register_forward_hook(pass_on, with_kwargs=True).remove)
        yield


# --- whole cuts --------------------------------------------------------------------------------------------------


def search_windows(windows_BT: Tensor) -> Tensor:
    """The first windows, SEARCH_TOKENS in all, or one."""
    return windows_BT[: max(1, SEARCH_TOKENS // windows_BT.shape[1])]


def measure_kl(dense: Any, model: Any, windows_BT: Tensor) -> float:
    """KL(dense || model) on the first SEARCH_TOKENS, nats per token; infinite where it is not a number."""
    windows_BT = search_windows(windows_BT)
    total = 0.0
    for ids_T in windows_BT:
        with torch.no_grad():
            dense_TD = compute_hidden(dense, ids_T[None])[0]
        total += measure_losses(model, ids_T, dense_TD)[0].kl
    return total / windows_BT.numel() if math.isfinite(total) else math.inf


@torch.no_grad()
def check_cut(dense: Any, cut: Cut, model: Any, ids_T: Tensor) -> None:
    """Compare the cut model, not fitted, with the dense one without what went. Raises UserError where they differ.

    They do when an architecture orders its heads, or treats its blocks, in a way that is not known here.
    """
    with _masked(cut.fits), skipping(Blocks(dense), cut.dropped):
        expected_BTD = compute_hidden(dense, ids_T[None]).float()
    difference = (compute_hidden(model, ids_T[None]).float() - expected_BTD).norm() / expected_BTD.norm()
    if not float(difference) <= TOLERANCE:
        raise UserError(
            f"the cut {type(model).__name__} does not compute what the dense one does without what was cut; "
            "this architecture is not supported"
        )


@contextmanager
def _masked(fits: Sequence[Fit]) -> Iterator[None]:
    """Inside, what goes is zero where the output projections read it."""
    with ExitStack() as undo:
        for part, units, *_ in fits:
            weight_OI = part.output.weight_OI
            stays_I = weight_OI.new_zeros(weight_OI.shape[1])
            stays_I[expand_units(units, len(stays_I) // part.units)] = 1
            undo.callback(part.output.module.register_forward_pre_hook(_masking(stays_I)).remove)
        yield


def _masking(stays_I: Tensor) -> Callable[..., tuple[Tensor]]:
    return lambda _module, inputs: (inputs[0] * stays_I,)
