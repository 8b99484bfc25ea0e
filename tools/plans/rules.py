"""The registry of allocations: how a number of zeros is shared out over the layers.

One more that reads what a profile holds is a function and a line here: what planners, flags, help, tables and plots
say of allocations is made from this list. OWL is arXiv 2310.05175 and AlphaPruning arXiv 2410.10912; what they measure
of the weights is in `tools.statistics.table`. Shape suffixes: L layers, G sparsities of the grid.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from tools.base.errors import ImpossiblePlan
from tools.plans.budget import Budget, blend_to_budget, meet_budget
from tools.plans.layer_profile import Array, LayerProfile, predict_layer_kl

UNIFORM = "uniform"
"""The allocation that all others are mixed with by a recipe's strength."""

_GRID = np.linspace(0, 1, 801)
"""Sparsities a layer may take before the last rounding."""

OWL_LAMBDA = 0.08
"""OWL's lambda: keep ratios span twice this."""

ALPHA_EPSILON = 0.3
"""AlphaPruning's epsilon: sparsities span 1 - epsilon to 1 + epsilon of a common factor. The code's default, and its
value for Wanda on most models; the published runs of LLaMA-2-7B have 0.5 for magnitude and 0.2 for SparseGPT."""


def share_evenly(budget: Budget) -> Array:
    """The same sparsity everywhere, as far as bounds allow."""
    return meet_budget(budget, lambda level: np.full(len(budget.layers), level), 1.0)


def share_by_kl(budget: Budget) -> Array:
    """Minimise sum_l w_l kappa_l(s_l), by bisection on the multiplier of the budget (the problem is separable)."""
    curves_LG = np.stack([predict_layer_kl(layer, _GRID) for layer in budget.layers])
    for places, factor in budget.factors:
        curves_LG[places] *= factor
    even_L, cheapest_L = share_evenly(budget), _minimise_kl(curves_LG, budget)
    # A curve that bends down can mislead the search.
    return cheapest_L if _total_kl(curves_LG, cheapest_L) < _total_kl(curves_LG, even_L) else even_L


def _minimise_kl(curves_LG: Array, budget: Budget) -> Array:
    """Sparsities minimising the sum of the curves at the budget."""
    low_L, high_L = budget.low_L, budget.high_L
    allowed_LG = (_GRID >= low_L[:, None]) & (_GRID <= high_L[:, None])
    curves_LG = np.where(allowed_LG, curves_LG, np.inf)
    amounts_LG = budget.weights_L[:, None] * _GRID
    cost_LG = np.empty_like(amounts_LG)

    def choose(log_price: float) -> Array:
        np.subtract(curves_LG, np.multiply(amounts_LG, np.exp(log_price), out=cost_LG), out=cost_LG)
        best_L = _GRID[np.argmin(cost_LG, axis=1)]
        within_L = np.where(allowed_LG.any(axis=1), best_L, low_L)  # bounds may be closer than the grid
        chosen_L: Array = np.clip(within_L, low_L, high_L)
        return chosen_L

    cheap, dear = -80.0, 40.0
    for _ in range(60):  # after which the two are neighbouring numbers
        middle = (cheap + dear) / 2
        if (choose(middle) * budget.weights_L).sum() > budget.zeros:
            dear = middle
        else:
            cheap = middle
    return blend_to_budget(budget, [low_L, choose(cheap), choose(dear), high_L])


def _total_kl(curves_LG: Array, sparsity_L: Array) -> float:
    return sum(float(np.interp(s, _GRID, curve_G)) for s, curve_G in zip(sparsity_L, curves_LG, strict=True))


def share_by_outliers(budget: Budget) -> Array:
    """OWL: keep ratios by the shares of outliers, shifted to the budget. Raises ImpossiblePlan without those."""
    outliers_L = np.array([layer.outliers for layer in budget.layers], dtype=np.float64)  # None becomes NaN
    if np.isnan(outliers_L).any():
        raise ImpossiblePlan("this profile has no shares of outliers, which allocation 'owl' needs; take another")
    keep_L = rank_by_outliers(outliers_L)
    return meet_budget(budget, lambda shift: shift - keep_L, 1 + keep_L.max())


def rank_by_outliers(outliers_L: Array) -> Array:
    """OWL's keep ratio of each layer before the shift to the budget: 2 lambda (D - min D) / (max D - min D)."""
    return 2 * OWL_LAMBDA * _scale_to_unit(outliers_L)


def share_by_alpha(budget: Budget) -> Array:
    """AlphaPruning: sparsities by the blocks' mean alphas, scaled to the budget. Raises ImpossiblePlan without them."""
    alpha_L = _read_alpha(budget.layers)
    share_L = rank_by_alpha(alpha_L, [layer.block for layer in budget.layers])
    return meet_budget(budget, lambda scale: scale * share_L, 1 / share_L.min())


def _read_alpha(layers: Sequence[LayerProfile]) -> Array:
    """The layers' alphas, NaN where a layer has none; every block has a layer that has one."""
    known = {layer.block for layer in layers if layer.alpha is not None}
    lacking = sorted({layer.block for layer in layers} - known)
    if lacking:
        raise ImpossiblePlan(
            f"this profile has no alpha of block {lacking[0]}, which allocation 'alphapruning' needs; take another"
        )
    return np.array([layer.alpha for layer in layers], dtype=np.float64)


def rank_by_alpha(alpha_L: Array, block_L: Sequence[int]) -> Array:
    """AlphaPruning's sparsity of each layer before the scaling to the budget, 1 - epsilon to 1 + epsilon.

    Linear in the mean alpha of the layer's block: every block needs a layer whose alpha is not NaN.
    """
    blocks = np.array(block_L)
    mean_L = np.empty(len(alpha_L))
    for block in set(block_L):
        mean_L[blocks == block] = np.nanmean(alpha_L[blocks == block])
    return 1 - ALPHA_EPSILON + 2 * ALPHA_EPSILON * _scale_to_unit(mean_L)


def _scale_to_unit(values: Array) -> Array:
    span = values.max() - values.min()
    scaled: Array = (values - values.min()) / (span if span > 0 else 1.0)
    return scaled


Kind = Literal["rule", "search", "parts"]
"""How an allocation is decided. rule: by a function of the profile, which a recipe may name. search: on a workbench,
among allocations that are carried out and measured. parts: none is shared out, whole parts of the model go."""


class Way(NamedTuple):
    """One entry."""

    name: str
    sentence: str
    """What it does, for planners and in help, without a full stop."""
    share: Callable[[Budget], Array] | None = None
    """Of a rule: the sparsity of each layer, at the budget but for rounding and within bounds; raises ImpossiblePlan
    where the profile lacks what it reads."""
    needs: tuple[str, ...] = ()
    """Fields of `LayerProfile` that it reads: measured first, where they are not in every profile."""
    ours: bool = False
    """Whether it is Billhook's own; the others, which are baselines, stand before it wherever they are compared."""
    kind: Kind = "rule"
    parts: tuple[str, ...] = ()
    """Of the kind parts: which of a model's parts go."""
    published: bool = False
    """Of the kind parts: whether it is run as its authors run it, so that what stays is never refitted."""

    @property
    def reads_curves(self) -> bool:
        """Whether it goes by the KL curves, so that factors on them count."""
        return "kappa" in self.needs


ALLOCATIONS = {
    way.name: way
    for way in (
        Way(
            "kappa",
            "minimise the predicted KL over the layers; only here do factors count",
            share_by_kl,
            needs=("kappa",),
            ours=True,
        ),
        Way(UNIFORM, "the same sparsity everywhere", share_evenly),
        Way(
            "owl",
            "less in blocks where more Wanda scores lie far above the mean",
            share_by_outliers,
            needs=("outliers",),
        ),
        Way("alphapruning", "less in blocks whose weights have heavy-tailed spectra", share_by_alpha, needs=("alpha",)),
        Way(
            "evolution",
            "EvoPress (arXiv 2410.14649): an evolutionary search of --evolution generations on calibration text",
            kind="search",
        ),
    )
}
"""By name, in the order in which planners are told of those that they may take, which are the rules."""


WAYS_OF_PARTS = {
    way.name: way
    for way in (
        Way(
            "flap",
            "FLAP (arXiv 2312.11983): neurons and groups of heads ranked over the whole model, a bias for what went",
            kind="parts",
            parts=("neurons", "heads"),
            published=True,
        ),
        Way(
            "llm-pruner",
            "LLM-Pruner (arXiv 2305.11627) without its fine-tuning: neurons and groups of heads by first-order scores, "
            "the same share of all blocks but the first and the last",
            kind="parts",
            parts=("neurons", "heads"),
            published=True,
        ),
        Way(
            "shortgpt",
            "ShortGPT (arXiv 2403.03853): the whole blocks that change their input's direction least",
            kind="parts",
            parts=("blocks",),
            published=True,
        ),
        Way(
            "sleb",
            "SLEB (arXiv 2402.09025): whole blocks, one after another, each the one without which the loss is lowest",
            kind="parts",
            parts=("blocks",),
            published=True,
        ),
        Way(
            "slicegpt",
            "SliceGPT (arXiv 2401.15024): principal components of what passes between the blocks, of the hidden width",
            kind="parts",
            parts=("width",),
            published=True,
        ),
        Way(
            "equal",
            "the same number of neurons and groups of heads from every block, each block's own lowest-scored",
            kind="parts",
            parts=("neurons", "heads"),
        ),
        Way("depth", "whole blocks", kind="parts", parts=("blocks",)),
        Way(
            "kappa",
            "neurons, groups of heads and whole blocks: those that the least KL is predicted for, the same number from "
            "every block that stays, and as many blocks as cost the least on calibration text",
            ours=True,
            kind="parts",
            parts=("neurons", "heads", "blocks"),
        ),
    )
}
"""How it is chosen which parts go; a name may be that of an allocation, too."""


def name_allocations(*kinds: Kind) -> list[str]:
    """The names of all allocations of some kinds."""
    return [way.name for way in (*ALLOCATIONS.values(), *WAYS_OF_PARTS.values()) if way.kind in kinds]


RULES = {name: way for name, way in ALLOCATIONS.items() if way.kind == "rule"}

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(RULES)]
