"""What the calibration text says of every prunable layer: moments, gradients, and the predicted KL of pruning it.

The calibration text walks up through the blocks, one after another, and its gradients walk down again (`walks.py`).
All figures are sums over its shards (`shards.py`). No layer is ever pruned to measure it.

A token before the text of each window, the beginning of the sequence, is read by layers like any other, and what flows
back to it counts: every later token attends to it, and models keep their largest activations there. Left out, a layer
might do with it as it likes. It stands once in a window, as in use; and it only predicts nothing that a loss counts.
(Gemma 3 270M at 30 % came out the same within the error with it left out of the moments: KL 0.129 ± 0.012 by Wanda.)

Shape suffixes: T tokens, I input features (d_in), O output features (d_out).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tools.base.errors import UnknownStatistics
from tools.base.progress import Progress, count_up
from tools.base.settings import QUESTIONS, Calibration
from tools.models.layers import Layer
from tools.plans.layer_profile import LEVELS
from tools.statistics.experts import FEW, count_seen, fill_up, fill_up_moments, list_pools
from tools.statistics.known import (
    KeptBlocks,
    ModelStatistics,
    Way,
    know_nothing,
    lean,
    mix_gamma,
    mix_statistics,
    mix_tensors,
)
from tools.statistics.passage import Purpose, Walk, split_texts
from tools.statistics.requests import (
    Extent,
    Parts,
    SumCurves,
    SumGradients,
    SumMaskCurves,
    SumMoments,
    Team,
    ask_in_turn,
    begin_walk,
    ignore_ticks,
    join_answers,
)
from tools.statistics.shards import Sums
from tools.statistics.walks import Nodes, layers_by_block


class Moments(NamedTuple):
    """What one block's layers read; fp32, by the first layer of each group that reads the same tensor (q, k and v)."""

    mean_square: dict[str, Tensor]
    """Mean of x^2 of each input."""
    second_moment: dict[str, Tensor]
    """Mean of x x^T; empty where only the mean squares were asked for."""
    group: dict[str, str]
    few: dict[str, int]
    """As in `ModelStatistics`."""

    def bring_near(self) -> "Moments":
        """The same in CPU memory."""
        squares, moments = ({k: x.cpu() for k, x in part.items()} for part in (self.mean_square, self.second_moment))
        return self._replace(mean_square=squares, second_moment=moments)


def collect_moments(
    team: Team,
    extent: Extent,
    walk: Walk,
    block: int,
    layers: Sequence[Layer],
    *,
    full: bool = True,
    purpose: Purpose = "moments",
) -> Moments:
    """The moments of what the layers of a block read: fp32, means over all tokens.

    The mean squares alone, not `full`, are all that masks without an update need, at a fraction of the products.
    Experts that few tokens were sent to have those of all filled in. Raises UnknownStatistics for any other layer that
    never ran.
    """
    answers = team.ask(SumMoments(walk, block, full, purpose))(ignore_ticks)
    return _finish_moments(answers, extent, layers, full)


def _finish_moments(
    answers: Sequence[tuple[Nodes, dict[str, str]]], extent: Extent, layers: Sequence[Layer], full: bool
) -> Moments:
    sums = join_answers(extent, [nodes for nodes, _ in answers])
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
    few = fill_up_moments(sums, extent.positions, layers, group, full)
    leaders = dict.fromkeys(group.values())
    means = {key: sums[key] for name in leaders for key in (f"A/{name}", f"a/{name}") if key in sums}
    for total in means.values():
        total /= extent.positions
    second = {name: means[f"A/{name}"] for name in leaders if f"A/{name}" in means}
    squares = {leader: means.get(f"a/{leader}") for leader in leaders}
    mean_square = {name: second[name].diagonal() if mean_I is None else mean_I for name, mean_I in squares.items()}
    return Moments(mean_square, second, group, few)


def collect_statistics(
    team: Team,
    extent: Extent,
    layers: Sequence[Layer],
    progress: Progress,
    keep_moment: Callable[[str, Tensor], None] | None,
    dense: Mapping[str, Tensor] | None = None,
    kept: KeptBlocks | None = None,
) -> ModelStatistics:
    """Input moments over all windows; output-gradient moments and KL curves over the gradient windows.

    Each second moment is handed to `keep_moment` (name of its group, A) as soon as it is whole, and not held; without
    it only mean squares are collected.
    kappa(s) = 1/(2T) sum_t (g_t^T dW(s) x_t)^2 with g from labels drawn from the model itself; dW is what the
    two-sided mask removes of the `dense` weights where they are given, else of those in the model. What is `kept` of
    blocks is not collected again, nor are their second moments handed out. Raises UnknownStatistics for a layer that
    never ran.
    """
    with begin_walk(team) as walk:
        return _collect_one(team, extent, walk, layers, progress, keep_moment, dense, kept)


def collect_questions(
    team: Team,
    extent: Extent,
    layers: Sequence[Layer],
    progress: Progress,
    keep_moment: Callable[[str, Tensor], None] | None,
    run: ModelStatistics,
    kept: KeptBlocks | None = None,
) -> ModelStatistics:
    """As `collect_statistics`, of the windows of questions before the run's own text alone.

    The KL curves are about the masks of the `run`'s statistics, so that they can be added to that text's own.
    """
    with begin_walk(team, QUESTIONS, shares=[1.0, 0.0]) as walk:
        return _collect_one(team, extent, walk, layers, progress, keep_moment, None, kept, [run])


def _collect_one(
    team: Team,
    extent: Extent,
    walk: Walk,
    layers: Sequence[Layer],
    progress: Progress,
    keep_moment: Callable[[str, Tensor], None] | None,
    dense: Mapping[str, Tensor] | None,
    kept: KeptBlocks | None,
    masks: Sequence[ModelStatistics] = (),
) -> ModelStatistics:
    """What one text says, up and down; `masks` as in `_walk_down`."""
    grouped, keepers = group_layers(layers), [kept] if kept else []
    statistics = _walk_up(team, extent, walk, grouped, progress, keep_moment, kept, "profile")
    _walk_down(team, extent, walk, grouped, progress, [statistics], dense, keepers, [1.0], masks)
    return statistics


def collect_texts(
    team: Team,
    extent: Extent,
    layers: Sequence[Layer],
    progress: Progress,
    keep_moment: Callable[[int, str, Tensor], None] | None,
    shares: Sequence[float],
    dense: Mapping[str, Tensor] | None = None,
    kept: Sequence[KeptBlocks] = (),
    read: Mapping[int, ModelStatistics] | None = None,
) -> list[ModelStatistics]:
    """As `collect_statistics`, for each text of a calibration text of several, which count these `shares` in the run.

    All figures are a text's own. The KL curves of all are about one mask at each level, that of the run's statistics,
    so that curves can be summed up as well; for other shares they are those of that mask. Each text walks up for
    itself, and all walk down together. `keep_moment` is told the number of the text first; there is one of `kept` for
    each. What layers `read` of a text is known where it is given, without gradients and curves: it does not walk up.
    """
    grouped, texts, parts = group_layers(layers), range(len(shares)), list[ModelStatistics]()
    for text in texts:
        if read and text in read:
            parts.append(read[text])
            continue
        keep = None if keep_moment is None else partial(keep_moment, text)
        with begin_walk(team, shares=[float(other == text) for other in texts]) as walk:
            own = kept[text] if kept else None
            parts.append(_walk_up(team, extent, walk, grouped, progress, keep, own, "moments"))
    with begin_walk(team, shares=[1 / len(shares) for _ in texts]) as walk:
        _walk_down(team, extent, walk, grouped, progress, parts, dense, kept, shares)
    return parts


def _read_passed(
    kept: Sequence[KeptBlocks],
    way: Way,
    blocks: Iterable[int],
    parts: Sequence[ModelStatistics],
    extent: Extent,
    ticks: Callable[[int], None],
) -> list[int]:
    """Take over what is kept of blocks, which are given in the order of the walk; those that are still to be passed."""
    left = list(blocks)
    while left and kept:
        found = [keeper.read(way, left[0]) for keeper in kept]
        known = [own for own in found if own is not None]
        if len(known) < len(found):
            break
        for part, own in zip(parts, known, strict=True):
            part.take(own)
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
    purpose: Purpose,
) -> ModelStatistics:
    """What the layers read; gradients and curves are empty."""
    statistics, full = know_nothing(), keep_moment is not None
    ticks = count_up(progress, "statistics", len(grouped) * extent.shards)
    left = _read_passed([kept] if kept else [], "up", range(len(grouped)), [statistics], extent, ticks)
    answers = ask_in_turn(team, [SumMoments(walk, block, full, purpose) for block in left], ticks)
    for block in left:
        layers, part = grouped[block], know_nothing()
        moments = _finish_moments(next(answers), extent, layers, full)
        part.group |= moments.group
        part.few |= moments.few
        for layer in layers:
            leader = moments.group[layer.name]
            part.mean_square[layer.name] = moments.mean_square[leader].to(layer.device, copy=True)
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
    parts: Sequence[ModelStatistics],
    dense: Mapping[str, Tensor] | None,
    kept: Sequence[KeptBlocks],
    shares: Sequence[float],
    masks: Sequence[ModelStatistics] = (),
) -> None:
    """Fill in gradients and curves of the parts that the text has: curves about the masks of these by their shares, or
    of those of other `masks`."""
    unchanged = torch.empty(0)
    ticks = count_up(progress, "gradients", len(grouped) * extent.shards)
    left = _read_passed(kept, "down", reversed(range(len(grouped))), parts, extent, ticks)
    requests = [SumGradients(walk, block) for block in left]
    for block, answers in zip(left, ask_in_turn(team, requests, ticks), strict=True):
        layers, known = grouped[block], {}
        found = [_finish_gradients(sums, extent, layers) for sums in split_texts(join_answers(extent, answers), walk)]
        for layer in layers:
            name = layer.name
            a_I = mix_tensors([part.mean_square[name] for part in masks or parts], shares)
            gamma_O = mix_gamma([own.gradient_square[name] for own in masks or found], shares, extent.gradients)
            known[name] = unchanged if dense is None else dense[name], a_I, gamma_O
        curves = team.ask(SumMaskCurves(walk, block, known))(ignore_ticks)
        for own, sums in zip(found, split_texts(join_answers(extent, curves), walk), strict=True):
            own.kappa |= finish_curves(sums, extent, layers)
        for part, own in zip(parts, found, strict=True):
            part.take(own)
        for keeper, own in zip(kept, found, strict=bool(kept)):
            keeper.keep("down", block, own)


def _finish_gradients(sums: Sums, extent: Extent, layers: Sequence[Layer]) -> ModelStatistics:
    """Gradients of a block's layers, from their sums over one text."""
    tokens, part = extent.gradients, know_nothing()
    seen: dict[str, int] = {}
    for pool in list_pools(layers):
        seen |= {name: max(n, FEW) for name, n in count_seen(sums, pool, tokens).items()}
        for kind in ("plain", "clipped"):
            fill_up(sums, kind, pool, FEW, tokens)
    for layer in layers:
        name = layer.name
        nothing_O = torch.zeros_like(layer.weight_OI[:, 0], dtype=torch.float32)
        for kind, square in (("plain", part.gradient_square), ("clipped", part.clipped_square)):
            mean_O = sums.get(f"{kind}/{name}", nothing_O).to(layer.device) / tokens
            square[name] = lean(mean_O, seen.get(name, tokens))
        part.gradient[name] = float(sums.get(f"language/{name}", 0.0)) / extent.gradient_windows
    return part


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

    One walk up and one down over the gradient windows; nats per token, and `kept`, as in `collect_statistics`. `shares`
    are as in `Walk`.
    """
    grouped, statistics = group_layers(layers), know_nothing()
    counting = [share for share in shares if share] or [1.0]
    ticks = count_up(progress, "gradients", len(grouped) * extent.shards)
    kepts = [kept] if kept else []
    left = _read_passed(kepts, "down", reversed(range(len(grouped))), [statistics], extent, ticks)
    with begin_walk(team, text, shares=shares) as walk:
        for block in left:
            sums = join_answers(extent, team.ask(SumCurves(walk, block, parts_of(grouped[block])))(ticks))
            found = [know_nothing() for _ in counting]
            for own, of_text in zip(found, split_texts(sums, walk), strict=True):
                own.kappa |= finish_curves(of_text, extent, grouped[block])
            part = mix_statistics(found, counting, extent.gradients)
            statistics.take(part)
            if kept is not None:
                kept.keep("down", block, part)
    return statistics.kappa


def finish_curves(sums: Sums, extent: Extent, layers: Sequence[Layer]) -> dict[str, list[float]]:
    """The KL curves of a block's layers, from their sums over one text."""
    tokens = extent.gradients
    for pool in list_pools(layers):
        fill_up(sums, "curve", pool, FEW, tokens)
    nothing = torch.zeros(len(LEVELS), dtype=torch.float64)  # of experts none of which these windows reached
    return {x.name: [float(total) for total in sums.get(f"curve/{x.name}", nothing) / (2 * tokens)] for x in layers}


def group_layers(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of each block, to the last that has any."""
    return layers_by_block(layers, 1 + max(layer.block for layer in layers))
