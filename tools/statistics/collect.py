"""What the calibration text says of every prunable layer: moments, gradients, and the predicted KL of pruning it.

The calibration text walks up through the blocks, one after another, and its gradients walk down again (`walks.py`).
All figures are sums over its shards (`shards.py`). No layer is ever pruned to measure it.

A token before the text of each window, the beginning of the sequence, is read by layers like any other, and what flows
back to it counts: every later token attends to it, and models keep their largest activations there. Left out, a layer
might do with it as it likes. It stands once in a window, as in use; and it only predicts nothing that a loss counts.
(Gemma 3 270M at 30 % came out the same within the error with it left out of the moments: KL 0.129 ± 0.012 by Wanda.)

Shape suffixes: T tokens, I input features (d_in), O output features (d_out).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tools.base.errors import UnknownStatistics
from tools.base.progress import Progress, count_up
from tools.base.settings import Calibration
from tools.models.blocks import Blocks
from tools.models.layers import Layer
from tools.plans.layer_profile import LEVELS
from tools.statistics.experts import FEW, fill_up, find_few, list_pools
from tools.statistics.requests import (
    Alone,
    Finish,
    ListStages,
    Parts,
    SumCurves,
    SumGradients,
    SumMaskCurves,
    SumMoments,
    Team,
    ask_in_turn,
    ignore_ticks,
)
from tools.statistics.shards import SHARDS, Span, Sums, join_nodes
from tools.statistics.walk import Purpose, Walk
from tools.statistics.walks import Nodes, Walks, layers_by_block


@dataclass
class ModelStatistics:
    """What the calibration text says of every layer, fp32 on the model's device."""

    mean_square: dict[str, Tensor]
    gradient_square: dict[str, Tensor]
    clipped_square: dict[str, Tensor]
    """Gamma with each token clipped at `tools.statistics.walks.CLIP` times the median one."""
    group: dict[str, str]
    """Layer name to the first layer that reads the same input, under whose name their second moment is kept."""
    gradient: dict[str, float]
    """The paper's gradient score."""
    kappa: dict[str, list[float]]
    """The KL each layer is predicted to cost at each of LEVELS, two-sided mask, nats per token."""
    few: dict[str, int] = field(default_factory=dict)
    """Tokens that experts were sent which were sent too few of them (`tools.statistics.experts`)."""

    def take(self, part: "ModelStatistics") -> None:
        """Add what is known of more layers."""
        for own in fields(self):
            getattr(self, own.name).update(getattr(part, own.name))


def _know_nothing() -> ModelStatistics:
    return ModelStatistics({}, {}, {}, {}, {}, {})


Way = Literal["up", "down"]


class KeptBlocks(Protocol):
    """Whoever keeps what a walk learnt of each block, so that it goes on from there once it was interrupted."""

    def read(self, way: Way, block: int) -> ModelStatistics | None:
        """What was learnt of a block; None where it was not passed."""

    def keep(self, way: Way, block: int, part: ModelStatistics) -> None:
        """Keep what was learnt of a block."""


class Moments(NamedTuple):
    """What one block's layers read; fp32, by the first layer of each group that reads the same tensor (q, k and v)."""

    mean_square: dict[str, Tensor]
    """Mean of x^2 of each input."""
    second_moment: dict[str, Tensor]
    """Mean of x x^T; empty where only the mean squares were asked for, and of every layer where tokens have weights."""
    group: dict[str, str]
    few: dict[str, int]
    """As in `ModelStatistics`."""


_walks = itertools.count()


@contextmanager
def begin_walk(
    team: Team, text: Calibration = "run", *, every: bool = False, shares: Sequence[float] = ()
) -> Iterator[Walk]:
    """One more walk through a calibration text; afterwards nothing of it is held.

    Gradients flow back through its gradient windows, or through `every` window. `shares` are as in `Walk`: given
    wherever the text is several.
    """
    try:
        yield Walk(next(_walks), text, every, tuple(shares))
    finally:
        team.ask(Finish())(ignore_ticks)


class Extent(NamedTuple):
    """How much calibration text there is."""

    windows: int
    gradient_windows: int
    """Of each text."""
    tokens: int
    """Of one window's text: those that its losses count."""
    lead: int = 0
    """Tokens of a window before its text."""
    texts: int = 1
    """How many texts, equally long, the windows are."""

    @property
    def shards(self) -> int:
        """How many its sums are made of."""
        return min(SHARDS, self.windows)

    @property
    def positions(self) -> int:
        """Tokens that layers read of all windows; where these are of several texts, whose shares are 1 in sum, of each
        text."""
        return self.windows // self.texts * (self.lead + self.tokens)


def work_alone(
    blocks: Blocks,
    layers: Sequence[Layer],
    windows_BT: Tensor,
    gradient_windows: int,
    seed: int,
    scratch: Path,
    mixed: Mapping[Calibration, Tensor] | None = None,
    lead: int = 0,
    texts: int = 1,
) -> tuple[Team, Extent]:
    """This process as the team that walks through calibration text; files without a name lie in `scratch`.

    The texts `mixed` have as many windows as the run's own. The first `lead` tokens of each window are no text. Where
    the windows are of several `texts`, there are so many gradient windows of each.
    """
    flowing = min(gradient_windows, len(windows_BT) // texts)
    extent = Extent(len(windows_BT), flowing, windows_BT.shape[1] - lead, lead, texts)
    walks = Walks(blocks, layers, windows_BT, extent.gradient_windows, seed, scratch, mixed=mixed, lead=lead)
    return Alone(walks, extent.shards), extent


def collect_moments(
    team: Team,
    extent: Extent,
    walk: Walk,
    block: int,
    layers: Sequence[Layer],
    *,
    full: bool = True,
    purpose: Purpose = "moments",
    names: Sequence[str] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> Moments:
    """The moments of what the layers of a block read: fp32, means over all tokens.

    The mean squares alone, not `full`, are all that masks without an update need, at a fraction of the products. With
    `names`, of one of the stages that `find_stages` lists. With `weights` of tokens (`tools.statistics.weights`) every
    layer has a second moment for itself; mean squares are as without.
    Experts that few tokens were sent to have those of all filled in. Raises UnknownStatistics for any other layer that
    never ran.
    """
    answers = team.ask(SumMoments(walk, block, full, purpose, names, weights))(ignore_ticks)
    chosen = [layer for layer in layers if not names or layer.name in names]
    return _finish_moments(answers, extent, chosen, full)


def find_stages(team: Team, walk: Walk, block: int) -> list[list[str]]:
    """The stages of a block, in the order in which they run: names of layers that read the same tensor."""
    return next(stages for stages in team.ask(ListStages(walk, block))(ignore_ticks) if stages)


def _finish_moments(
    answers: Sequence[tuple[Nodes, dict[str, str]]], extent: Extent, layers: Sequence[Layer], full: bool
) -> Moments:
    sums = _join(extent, [nodes for nodes, _ in answers])
    group: dict[str, str] = {}
    for _, found in reversed(answers):
        group |= found  # the first one's counts
    ran = {layer.pool for layer in layers if layer.pool and layer.name in group}
    for layer in layers:
        if layer.name not in group and layer.pool not in ran:
            raise UnknownStatistics(
                f"layer {layer.name} never ran on the calibration text, so that nothing is known of it"
            )
        group.setdefault(layer.name, layer.name)
    few = _fill_up_moments(sums, extent, layers, group, full)
    names = dict.fromkeys([*group.values(), *group])  # where tokens have weights, all layers have sums
    means = {key: sums[key] for name in names for key in (f"A/{name}", f"a/{name}") if key in sums}
    for total in means.values():
        total /= extent.positions
    second = {name: means[f"A/{name}"] for name in names if f"A/{name}" in means}
    squares = {leader: means.get(f"a/{leader}") for leader in dict.fromkeys(group.values())}
    mean_square = {name: second[name].diagonal() if mean_I is None else mean_I for name, mean_I in squares.items()}
    return Moments(mean_square, second, group, few)


def _fill_up_moments(
    sums: Sums, extent: Extent, layers: Sequence[Layer], group: Mapping[str, str], full: bool
) -> dict[str, int]:
    """Of experts that were sent few tokens; the tokens of those that were sent fewer than they have inputs.

    Masks go by mean squares, which are their own where the second moments, of so many more figures, are not.
    """
    inputs = {layer.name: layer.weight_OI.shape[1] for layer in layers}
    few: dict[str, int] = {}
    for pool in list_pools(layers, group):
        few |= find_few(sums, pool, inputs[pool[0]], extent.positions)
        if full:
            sums |= {f"a/{name}": sums[f"A/{name}"].diagonal().clone() for name in pool if f"A/{name}" in sums}
            fill_up(sums, "A", pool, inputs[pool[0]], extent.positions)
        fill_up(sums, "a", pool, FEW, extent.positions)
    return {name: few[leader] for name, leader in group.items() if leader in few}


def _join(extent: Extent, answers: Sequence[Nodes]) -> Sums:
    known: dict[Span, Sums] = {node: sums for nodes in answers for node, sums in nodes}
    return join_nodes((0, extent.shards), known)


def collect_statistics(
    team: Team,
    extent: Extent,
    layers: Sequence[Layer],
    progress: Progress,
    keep_moment: Callable[[str, Tensor], None] | None,
    dense: Mapping[str, Tensor] | None = None,
    text: Calibration = "run",
    kept: KeptBlocks | None = None,
    shares: Sequence[float] = (),
) -> ModelStatistics:
    """Input moments over all windows; output-gradient moments and KL curves over the gradient windows.

    Each second moment is handed to `keep_moment` (name of its group, A) as soon as it is whole, and not held; without
    it only mean squares are collected.
    kappa(s) = 1/(2T) sum_t (g_t^T dW(s) x_t)^2 with g from labels drawn from the model itself; dW is what the
    two-sided mask removes of the `dense` weights where they are given, else of those in the model. What is `kept` of
    blocks is not collected again, nor are their second moments handed out. `shares` are as in `Walk`. Raises
    UnknownStatistics for a layer that never ran.
    """
    grouped = _group(layers)
    with begin_walk(team, text, shares=shares) as walk:
        statistics = _walk_up(team, extent, walk, grouped, progress, keep_moment, kept)
        _walk_down(team, extent, walk, grouped, progress, statistics, dense, kept)
    return statistics


def _read_passed(
    kept: KeptBlocks | None,
    way: Way,
    blocks: Iterable[int],
    statistics: ModelStatistics,
    extent: Extent,
    ticks: Callable[[int], None],
) -> list[int]:
    """Take over what is kept of blocks, which are given in the order of the walk; those that are still to be passed."""
    left = list(blocks)
    while left and kept is not None and (part := kept.read(way, left[0])) is not None:
        statistics.take(part)
        ticks(extent.shards)
        left.pop(0)
    return left


def _walk_up(
    team: Team,
    extent: Extent,
    walk: Walk,
    grouped: Sequence[Sequence[Layer]],
    progress: Progress,
    keep_moment: Callable[[str, Tensor], None] | None,
    kept: KeptBlocks | None,
) -> ModelStatistics:
    """What the layers read; gradients and curves are empty."""
    statistics, full = _know_nothing(), keep_moment is not None
    ticks = count_up(progress, "statistics", len(grouped) * extent.shards)
    left = _read_passed(kept, "up", range(len(grouped)), statistics, extent, ticks)
    answers = ask_in_turn(team, [SumMoments(walk, block, full, "profile") for block in left], ticks)
    for block in left:
        layers, part = grouped[block], _know_nothing()
        moments = _finish_moments(next(answers), extent, layers, full)
        part.group |= moments.group
        part.few |= moments.few
        for layer in layers:
            leader = moments.group[layer.name]
            part.mean_square[layer.name] = moments.mean_square[leader].to(_device(layer), copy=True)
        if keep_moment is not None:
            for leader, moment_II in moments.second_moment.items():
                keep_moment(leader, moment_II)
            del moment_II
        del moments  # they are large: let them go before those of the next block are made
        statistics.take(part)
        if kept is not None:
            kept.keep("up", block, part)
    return statistics


def _walk_down(
    team: Team,
    extent: Extent,
    walk: Walk,
    grouped: Sequence[Sequence[Layer]],
    progress: Progress,
    statistics: ModelStatistics,
    dense: Mapping[str, Tensor] | None,
    kept: KeptBlocks | None,
) -> None:
    """Fill in gradients and curves."""
    tokens, unchanged = extent.gradient_windows * extent.tokens, torch.empty(0)
    ticks = count_up(progress, "gradients", len(grouped) * extent.shards)
    left = _read_passed(kept, "down", reversed(range(len(grouped))), statistics, extent, ticks)
    requests = [SumGradients(walk, block) for block in left]
    for block, answers in zip(left, ask_in_turn(team, requests, ticks), strict=True):
        sums, layers, part = _join(extent, answers), grouped[block], _know_nothing()
        for pool, kind in itertools.product(list_pools(layers), ("plain", "clipped")):
            fill_up(sums, kind, pool, FEW, tokens)
        known = {}
        for layer in layers:
            name = layer.name
            nothing_O = torch.zeros_like(layer.weight_OI[:, 0], dtype=torch.float32)
            gamma_O = sums.get(f"plain/{name}", nothing_O).to(_device(layer)) / tokens
            part.gradient_square[name] = gamma_O
            part.clipped_square[name] = sums.get(f"clipped/{name}", nothing_O).to(_device(layer)) / tokens
            part.gradient[name] = float(sums.get(f"language/{name}", 0.0)) / extent.gradient_windows
            weight_OI = unchanged if dense is None else dense[name]
            known[name] = weight_OI, statistics.mean_square[name], gamma_O
        curves = team.ask(SumMaskCurves(walk, block, known))(ignore_ticks)
        part.kappa |= _finish_curves(curves, extent, layers)
        statistics.take(part)
        if kept is not None:
            kept.keep("down", block, part)


def measure_kappa(
    team: Team,
    extent: Extent,
    layers: Sequence[Layer],
    progress: Progress,
    parts_of: Callable[[Sequence[Layer]], Parts],
    text: Calibration = "run",
    kept: KeptBlocks | None = None,
    shares: Sequence[float] = (),
) -> dict[str, list[float]]:
    """The KL curve of each layer for any change: `parts_of(layers)` is what each of LEVELS changes beyond the last.

    One walk up and one down over the gradient windows; nats per token, `kept` and `shares` as in `collect_statistics`.
    """
    grouped, statistics = _group(layers), _know_nothing()
    ticks = count_up(progress, "gradients", len(grouped) * extent.shards)
    left = _read_passed(kept, "down", reversed(range(len(grouped))), statistics, extent, ticks)
    with begin_walk(team, text, shares=shares) as walk:
        for block in left:
            answers, part = team.ask(SumCurves(walk, block, parts_of(grouped[block])))(ticks), _know_nothing()
            part.kappa |= _finish_curves(answers, extent, grouped[block])
            statistics.take(part)
            if kept is not None:
                kept.keep("down", block, part)
    return statistics.kappa


def _finish_curves(answers: Sequence[Nodes], extent: Extent, layers: Sequence[Layer]) -> dict[str, list[float]]:
    sums, tokens = _join(extent, answers), extent.gradient_windows * extent.tokens
    for pool in list_pools(layers):
        fill_up(sums, "curve", pool, FEW, tokens)
    nothing = torch.zeros(len(LEVELS), dtype=torch.float64)  # of experts none of which these windows reached
    return {x.name: [float(total) for total in sums.get(f"curve/{x.name}", nothing) / (2 * tokens)] for x in layers}


def _group(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of each block, to the last that has any."""
    return layers_by_block(layers, 1 + max(layer.block for layer in layers))


def _device(layer: Layer) -> torch.device:
    return layer.weight_OI.device
