"""The speed of masks, SparseGPT and the refit on layers, beside what their authors published.

Shape suffixes: O output features (rows), I input features (columns).
"""

import torch
from torch import Tensor

from billhook_kernels.masks import keep_highest, keep_highest_of_rows
from billhook_kernels.obs import prune_obs
from billhook_kernels.refit_steps import refit_in_steps
from tools.experiments.published import prune_as_published, remove_by_sort
from tools.experiments.speed import SPARSITY, Site, Task
from tools.models.layers import Layer
from tools.results.speed import Result

MASKS, OBS = 1 / 10, 1 / 3
"""Seconds of a mask of 4096 x 4096 and of SparseGPT on 2048 x 2048, of what their authors published."""


def bench_masks(site: Site) -> list[Result]:
    """Masks of the lowest scores, of every row and of the layer, against the stable sort of Wanda's authors."""
    results = []
    for side in site.settings.obs_sizes:
        rows, by_rows, layer, by_layer = _time_masks(site, make_layer(side, side, site.bench.device)[0].square())
        reference, target = "a stable sort of them and a scatter", MASKS if side == 4096 else None
        for name, part, ours, published in (("rows", "each row", rows, by_rows), ("layer", "all", layer, by_layer)):
            what = f"mask of the lowest of {part} of {side} x {side} scores, fp32"
            results.append(site.compare(f"masks/{side}/{name}", what, ours, reference, published, target))
    return results


def _time_masks(site: Site, score_OI: Tensor) -> list[list[float]]:
    zeros, dead_OI = round(SPARSITY * score_OI.numel()), torch.zeros_like(score_OI, dtype=torch.bool)
    return site.time(
        Task(lambda: keep_highest_of_rows(score_OI, dead_OI, zeros)),
        Task(lambda: remove_by_sort(score_OI, SPARSITY)),
        Task(lambda: keep_highest(score_OI, dead_OI, zeros)),
        Task(lambda: remove_by_sort(score_OI.reshape(1, -1), SPARSITY)),
    )


def bench_obs(site: Site) -> list[Result]:
    """SparseGPT on random square layers, against the published loop; both begin with the second moment."""
    results = []
    for side in site.settings.obs_sizes:
        ours, published = _time_obs(site, *make_layer(side, side, site.bench.device))
        what, target = f"SparseGPT (prune_obs), {side} x {side}, fp32", OBS if side == 2048 else None
        reference = "the published loop, blocks of 128 columns"
        results.append(site.compare(f"obs/{side}", what, ours, reference, published, target))
    return results


def _time_obs(site: Site, weight_OI: Tensor, moment_II: Tensor) -> list[list[float]]:
    return site.time(
        Task(lambda: prune_obs(weight_OI, moment_II, round(SPARSITY * weight_OI.numel()))),
        Task(lambda: prune_as_published(weight_OI, moment_II, SPARSITY)),
    )


def make_layer(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weight (O, I), second moment (I, I)), random, fp32: inputs that move together, every ninth a loud one."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=generator)
    mix_IK = torch.randn(columns, max(1, columns // 8), generator=generator)
    mix_IK[::9] *= 5
    moment_II = mix_IK @ mix_IK.T / mix_IK.shape[1]
    moment_II.diagonal().add_(0.1)
    return weight_OI.to(device), moment_II.to(device)


def bench_refit(site: Site) -> list[Result]:
    """The refit in steps against SparseGPT, ours and published: on one layer of each shape, and over the model."""
    shapes: dict[tuple[int, ...], list[Layer]] = {}
    for layer in site.bench.layers:
        shapes.setdefault(tuple(layer.weight_OI.shape), []).append(layer)
    references = (("obs", "SparseGPT (prune_obs)"), ("published", "SparseGPT, the published loop"))
    results = []
    totals = []
    for (rows, columns), members in shapes.items():
        refit, *others = _time_refit(site, members[len(members) // 2])
        what = f"refit in steps, {rows} x {columns}, {len(members)} such layers"
        for (key, reference), other in zip(references, others, strict=True):
            results.append(site.compare(f"refit/{rows}x{columns}/{key}", what, refit, reference, other))
        totals.append([[len(members) * taken for taken in seconds] for seconds in (refit, *others)])
    # Every round of the model is the sum of the shapes' rounds; a slow shape may have fewer of them.
    refit, *others = ([sum(taken) for taken in zip(*seconds, strict=False)] for seconds in zip(*totals, strict=True))
    what = f"refit in steps, {len(site.bench.layers)} layers: each shape's time as often as it occurs"
    for (key, reference), other in zip(references, others, strict=True):
        results.append(site.compare(f"refit/model/{key}", what, refit, reference, other))
    obs, published = others
    what = what.replace("refit in steps", references[0][1])
    results.append(site.compare("obs/model", what, obs, references[1][1], published))
    return results


def _time_refit(site: Site, layer: Layer) -> list[list[float]]:
    """Of the refit, `prune_obs` and the published loop on a dense layer with its own statistics."""
    weight_OI = site.bench.dense[layer.name].to(site.bench.device)
    moment_II, gamma_O = site.read_statistics(layer.name)
    zeros = round(SPARSITY * weight_OI.numel())
    return site.time(
        Task(lambda: refit_in_steps(weight_OI, moment_II, gamma_O, zeros)),
        Task(lambda: prune_obs(weight_OI, moment_II, zeros)),
        Task(lambda: prune_as_published(weight_OI, moment_II, SPARSITY)),
    )
