"""What goes of a model, and the least-squares fit of what stays: how much, which heads and neurons, or which blocks.

Shape suffixes: B windows, T tokens, I input channels of an output projection.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from billhook_kernels.channels import (
    HalvedSums,
    InputMoments,
    expand_units,
    fit_kept,
    keep_highest_units,
    score_fluctuation,
    score_residual,
)
from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.base.settings import ALIGN
from tools.models.blocks import Blocks
from tools.models.layers import find_blocks, find_layers
from tools.models.readout import compute_hidden, measure_losses
from tools.models.unfinished import hold_states
from tools.plans.cuts import Counts
from tools.surgery.blocks import choose_blocks, fold_blocks, pass_on
from tools.surgery.moments import finish_moments, search_windows, tapped
from tools.surgery.parts import KINDS, Cut, Fit, Part, check_alike, find_parts
from tools.surgery.rebuild import accepts, build_cut, check_buildable


class ChosenCut(NamedTuple):
    """What goes of a model."""

    cut: Cut
    constraint: str
    """What held it to that, in words."""
    tokens: int
    """Calibration tokens put through cut models to choose."""


def choose_cut(
    model: Any,
    kinds: tuple[str, ...],
    remove: float,
    windows_BT: Tensor,
    step: Progress,
    *,
    refit: bool = True,
    lead: int = 0,
    align: int = ALIGN,
) -> ChosenCut:
    """The cut of these kinds of parts that takes `remove` of the weights of the blocks' linear layers away.

    Without `refit` what stays has its dense weights. The first `lead` tokens of each window are no text: they count in
    no KL. Raises UserError where there is no such cut.
    """
    candidates = list_counts(model, kinds, remove, align)
    for counts in candidates:
        check_buildable(model, counts)
    if "blocks" in kinds:
        order, tokens = choose_blocks(model, candidates[0].blocks, windows_BT, step, lead=lead)
        fits = list(fold_blocks(model, order, windows_BT, step)) if refit else []
        words = f"whole blocks, in this order, each the one without which KL was lowest: {', '.join(map(str, order))}"
        words += (
            "" if fits or not refit else "; nothing was refitted, as no MLP before them adds to what the blocks pass on"
        )
        return ChosenCut(Cut(candidates[0], fits, tuple(sorted(order))), words, tokens)
    cuts = choose_channels(model, candidates, windows_BT, step, refit=refit)
    words = _describe_counts(model, kinds, candidates[0], align)
    if len(cuts) == 1:
        return ChosenCut(cuts[0], words, 0)
    costs = [measure_kl(model, build_cut(model, cut), windows_BT, lead=lead) for cut in cuts]
    best = costs.index(min(costs))
    compared = ", ".join(f"{c.heads} ({cost:.3f})" for c, cost in zip(candidates, costs, strict=True))
    words = _describe_counts(model, kinds, candidates[best], align)
    words += f"; the number of groups that cost the least KL on calibration text, of {compared}"
    return ChosenCut(cuts[best], words, len(cuts) * search_windows(windows_BT, lead)[:, lead:].numel())


def _describe_counts(model: Any, kinds: tuple[str, ...], counts: Counts, align: int) -> str:
    parts = {kind: find_parts(model, kind)[0] for kind in ("heads", "neurons") if kind in kinds}
    names = {"heads": "groups of heads", "neurons": "neurons"}
    went = " and ".join(f"{getattr(counts, kind)} of {part.units} {names[kind]}" for kind, part in parts.items())
    words = f"every block loses the same number, its own lowest-scored: {went}"
    step = _find_step(parts["neurons"], align) if "neurons" in parts else 1
    words += f", so that a multiple of {step} neurons stays" if step > 1 else ""
    if "heads" in parts:
        refused = [str(n) for n in range(1, parts["heads"].units) if not accepts(model, Counts(heads=n))]
        words += f"; {type(model.config).__name__} refuses {', '.join(refused)} groups fewer" if refused else ""
    return words


# --- how much ----------------------------------------------------------------------------------------------------


def list_counts(model: Any, kinds: Sequence[str], remove: float, align: int = ALIGN) -> list[Counts]:
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
    options = {kind: list_options(model, part, align) for kind, part in parts.items()}
    if len(parts) == 1:
        return [Counts(**{k: _nearest(remove, shares[k], options[k], part.units) for k, part in parts.items()})]
    own, step = remove * parts["heads"].units, options["neurons"][-1] - options["neurons"][-2]
    below = max(n for n in options["heads"] if n <= own)
    found = []
    for heads in dict.fromkeys((below, min((n for n in options["heads"] if n >= own), default=below))):
        rest = (remove - heads * shares["heads"]) / shares["neurons"]
        neurons = min(options["neurons"], key=lambda gone: abs(gone - rest))
        if abs(neurons - rest) <= step / 2 and heads + neurons:
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


def list_options(model: Any, part: Part, align: int = ALIGN) -> Sequence[int]:
    """The numbers of units that may go, ascending from 0. Raises UserError where no multiple of `align` is left."""
    if part.kind == "neurons":
        step = _find_step(part, align)
        found = [gone for gone in range(part.units) if not gone or (part.units - gone) % step == 0]
        if len(found) < 2:
            raise UserError(f"of {part.units} neurons no multiple of {align} can stay but all; give a smaller align")
        return found
    return [n for n in range(part.units) if n == 0 or accepts(model, Counts(heads=n))]


def _find_step(part: Part, align: int) -> int:
    """Of what the neurons that stay are a multiple; of a default that the model's own are none of, of less."""
    return math.gcd(part.units, align) if align == ALIGN else align


def _nearest(remove: float, share: float, options: Sequence[int], units: int) -> int:
    """The number of units, of those that may go, nearest to the share to remove; `share` is that of one unit."""
    if len(options) == 1 or remove >= (options[-1] + units) / 2 * share:
        raise UserError(f"{remove:g} is too much to remove: {options[-1] * share:.2%} is the most that can go here")
    best = min(options, key=lambda n: abs(n * share - remove))
    if best == 0:
        raise UserError(f"{remove:g} is too little to remove: {options[1] * share:.2%} is the least that can go here")
    return best


# --- which heads and neurons -------------------------------------------------------------------------------------


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
        score_U = score_fluctuation(weight_OI, moments.variance_I)
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
    states = hold_states(model, range(len(windows_BT)), lambda window: blocks.embed(windows_BT[window]))
    for block, members in enumerate(zip(*parts, strict=True)):
        progress("choose and fit", block, len(blocks))
        sums = [HalvedSums(part.output.weight_OI.shape[1], windows_BT.device) for part in members]
        with tapped(members, [s.add for s in sums]):
            pass_on(blocks, windows_BT, states, range(block, block + 1))
        for part in members:
            moments = finish_moments(sums.pop(0), part)
            fits = {
                n: fit_part(part, moments, n, refit=refit) for n in {getattr(c, part.kind) for c in candidates} if n
            }
            for cut in cuts:
                if removed := getattr(cut.counts, part.kind):
                    cut.fits.append(fits[removed])
    progress("choose and fit", len(blocks), len(blocks))
    return cuts


def measure_kl(dense: Any, model: Any, windows_BT: Tensor, *, lead: int = 0) -> float:
    """KL(dense || model) on the first SEARCH_TOKENS, nats per token; infinite where it is not a number."""
    windows_BT = search_windows(windows_BT, lead)
    total = 0.0
    for ids_T in windows_BT:
        with torch.no_grad():
            dense_TD = compute_hidden(dense, ids_T[None])[0]
        total += measure_losses(model, ids_T, dense_TD, lead=lead)[0].kl
    return total / windows_BT[:, lead:].numel() if math.isfinite(total) else math.inf
