"""Models that whole parts are gone of, as rows of a comparison ask for them."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from tools.base.rows import read_search, write_kept
from tools.plans.jobs import PartsRecipe

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.surgery.parts import Cut
    from tools.workbench.bench import Workbench


class MadeParts(NamedTuple):
    """A model that parts are gone of."""

    model: Any
    removed: float
    """Share of the weights of the blocks' linear layers."""
    tokens: int
    """Put through models cut on trial."""
    seconds: float
    stock: bool = True
    """Whether it is of a shape that stock transformers has, and as fast as that."""


class SavedElimination(BaseModel):
    """The blocks that went one after another, and what it is about: another search never goes on from it."""

    about: list[str]
    order: list[int]
    seconds: list[float]


def take_parts(recipe: PartsRecipe, sparsity: float, bench: "Workbench", progress: "Progress") -> MadeParts:
    """The dense model in the workbench without the parts that the recipe takes. Raises UserError."""
    from tools.surgery.parts import refuse_apart  # imports torch

    refuse_apart(bench.model, f"structured:{recipe.name}")
    return MAKERS[recipe.name](recipe, sparsity, bench, progress)


def _cut_parts(recipe: PartsRecipe, sparsity: float, bench: "Workbench", progress: "Progress") -> MadeParts:
    """As `tools.structure` does it. Raises UserError."""
    from tools.surgery.choose import choose_cut  # imports torch

    began = time.monotonic()
    calibration, lead = bench.windows.calibration.to(bench.device), bench.windows.lead
    choice = choose_cut(bench.model, recipe.parts, sparsity, calibration, progress, refit=recipe.refit, lead=lead)
    return _build(choice.cut, choice.tokens, bench, began)


def _cut_by_curves(recipe: PartsRecipe, sparsity: float, bench: "Workbench", progress: "Progress") -> MadeParts:
    """As `tools.structure --parts auto` does it. Raises UserError."""
    from tools.surgery.share import choose_by_curves  # imports torch

    began = time.monotonic()
    calibration, lead = bench.windows.calibration.to(bench.device), bench.windows.lead
    choice = choose_by_curves(bench.model, sparsity, calibration, progress, refit=recipe.refit, lead=lead)
    return _build(choice.cut, choice.tokens, bench, began)


def _drop_by_influence(_recipe: PartsRecipe, sparsity: float, bench: "Workbench", progress: "Progress") -> MadeParts:
    """ShortGPT. Raises UserError."""
    from tools.surgery.published import drop_least, rank_blocks  # imports torch

    began = time.monotonic()
    cut = _count_blocks(sparsity, bench)
    calibration, lead = bench.windows.calibration.to(bench.device), bench.windows.lead
    influences = rank_blocks(bench.model, calibration, progress, lead=lead)
    cut.dropped = tuple(sorted(drop_least(influences, cut.counts.blocks)))
    return _build(cut, 0, bench, began)


def _drop_by_loss(_recipe: PartsRecipe, sparsity: float, bench: "Workbench", progress: "Progress") -> MadeParts:
    """SLEB, whose blocks are kept as they go: more of them are searched behind those. Raises UserError."""
    from tools.surgery.published import count_eliminated, eliminate_blocks  # imports torch

    began = time.monotonic()
    cut = _count_blocks(sparsity, bench)
    count, calibration, lead = cut.counts.blocks, bench.windows.calibration, bench.windows.lead
    text = hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    about, path = [bench.weights.hash_all_dense(), text, str(lead)], bench.directory / "search-structured-sleb.json"
    order, seconds = _read_elimination(path, about, bench.warn)
    earlier = sum(seconds[:count])
    for block in eliminate_blocks(bench.model, count, calibration.to(bench.device), progress, order, lead=lead):
        order.append(block)
        seconds.append(time.monotonic() - began + earlier - sum(seconds))
        write_kept(path, SavedElimination(about=about, order=order, seconds=seconds))
    cut.dropped = tuple(sorted(order[:count]))
    tokens = count_eliminated(len(bench.weights.by_block), count, calibration, lead)
    return _build(cut, tokens, bench, began - earlier)


def _read_elimination(path: Path, about: list[str], warn: Callable[[str], None]) -> tuple[list[int], list[float]]:
    """The blocks that went from the same model by the same text, and the seconds of each; none where none did."""
    saved = read_search(path, SavedElimination, warn)
    return (saved.order, saved.seconds) if saved and saved.about == about else ([], [])


def _count_blocks(sparsity: float, bench: "Workbench") -> "Cut":
    """As many blocks as come nearest to the share, which is checked; not yet which ones. Raises UserError."""
    from tools.surgery.choose import list_counts  # imports torch
    from tools.surgery.parts import Cut
    from tools.surgery.rebuild import check_buildable

    [counts] = list_counts(bench.model, ("blocks",), sparsity)
    check_buildable(bench.model, counts)
    return Cut(counts)


def _build(cut: "Cut", tokens: int, bench: "Workbench", began: float) -> MadeParts:
    """A stock model, compared with the dense one without what went. Raises UserError."""
    from tools.surgery.parts import count_weights, without_fits  # imports torch
    from tools.surgery.rebuild import build_cut, check_cut

    dense = bench.model
    model = build_cut(dense, cut)
    seconds = time.monotonic() - began
    check_cut(dense, cut, build_cut(dense, without_fits(cut)), bench.windows.calibration[0].to(bench.device))
    return MadeParts(model, 1 - count_weights(model) / count_weights(dense), tokens, seconds)


def _rank_parts(recipe: PartsRecipe, sparsity: float, bench: "Workbench", progress: "Progress") -> MadeParts:
    """FLAP and LLM-Pruner, whose widths no stock architecture has. Raises UserError."""
    from tools.surgery.flap import build_narrowed, check_narrowed, rank_units  # imports torch
    from tools.surgery.taylor import rank_by_gradient

    began, calibration = time.monotonic(), bench.windows.calibration.to(bench.device)
    if recipe.name == "flap":
        ranking = rank_units(bench.model, sparsity, calibration, progress)
    else:
        ranking = rank_by_gradient(bench.model, sparsity, calibration, progress, lead=bench.windows.lead)
    model = build_narrowed(bench.model, ranking.narrowed)
    seconds = time.monotonic() - began
    check_narrowed(bench.model, ranking.narrowed, calibration[0])
    return MadeParts(model, ranking.removed, 0, seconds, stock=False)


def _slice_states(_recipe: PartsRecipe, sparsity: float, bench: "Workbench", progress: "Progress") -> MadeParts:
    """SliceGPT, whose rotations no stock architecture has. Raises UserError."""
    from tools.surgery.slicegpt import build_sliced, slice_states  # imports torch

    began = time.monotonic()
    sliced = slice_states(bench.model, sparsity, bench.windows.calibration.to(bench.device), progress)
    model = build_sliced(bench.model, sliced)
    return MadeParts(model, sliced.removed, 0, time.monotonic() - began, stock=False)


MAKERS: dict[str, Callable[[PartsRecipe, float, "Workbench", "Progress"], MadeParts]] = {
    "flap": _rank_parts,
    "llm-pruner": _rank_parts,
    "shortgpt": _drop_by_influence,
    "sleb": _drop_by_loss,
    "slicegpt": _slice_states,
    "equal": _cut_parts,
    "depth": _cut_parts,
    "kappa": _cut_by_curves,
}
"""By the names of WAYS_OF_PARTS."""
