"""The speed of statistics: Wanda in one shot, the profile with its KL curves, the curves of one method.

Shape suffixes: B windows, T tokens, O output features (rows), I input features (columns).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook_kernels.methods import LayerStatistics, prune_weight
from billhook_kernels.scores import score_wanda
from tools.base.progress import ignore_progress
from tools.experiments.published import remove_by_sort
from tools.experiments.speed import SPARSITY, Site, Task
from tools.models.blocks import Blocks
from tools.models.layers import Layer
from tools.models.readout import compute_hidden
from tools.plans.layer_profile import LEVELS
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation
from tools.results.speed import Result
from tools.statistics.collect import collect_moments, collect_statistics
from tools.statistics.extent import begin_walk, work_alone
from tools.statistics.scores import measure_wanda
from tools.statistics.walks import layers_by_block
from tools.workbench.store import DENSE

REFIT = Recipe(method="refit", refit=False, allocation="kappa", curves="method")


def bench_wanda(site: Site) -> list[Result]:
    """Wanda's masks of all layers at once, by dense statistics, against a forward of its calibration text.

    Wanda needs the mean square of every input; the refit needs the full second moments, whose walk is shown beside.
    """
    bench, windows_BT = site.bench, site.calibration_BT
    blocks = Blocks(bench.model)
    mean_square: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward() -> None:
        for ids_T in windows_BT:
            compute_hidden(bench.model, ids_T[None])

    def walk(full: bool) -> None:
        team, extent = work_alone(blocks, bench.layers, windows_BT, 0, 0, bench.directory, lead=bench.windows.lead)
        with begin_walk(team) as name:
            for block, layers in enumerate(layers_by_block(bench.layers, len(blocks))):
                moments = collect_moments(team, extent, name, block, layers, full=full)
                mean_square.update({layer: moments.mean_square[leader] for layer, leader in moments.group.items()})

    def prune() -> None:
        for layer in bench.layers:
            weight_OI = layer.weight_OI
            known = LayerStatistics(mean_square[layer.name], weight_OI.new_ones(len(weight_OI)))
            prune_weight("wanda", weight_OI, known, round(SPARSITY * weight_OI.numel()), refit=False)

    def prune_by_sort() -> None:
        for layer in bench.layers:
            weight_OI = layer.weight_OI
            remove_by_sort(score_wanda(weight_OI, mean_square[layer.name]), SPARSITY).logical_not().mul(weight_OI)

    def score() -> None:
        for layer in bench.layers:
            measure_wanda(layer.weight_OI, mean_square[layer.name])

    def score_by_numpy() -> None:
        for layer in bench.layers:
            scores_OI = score_wanda(layer.weight_OI, mean_square[layer.name])
            np.percentile(scores_OI.cpu().numpy(), 10, method="inverted_cdf")

    bench.restore(DENSE)
    bare, full, walked, pruned, sorted_, scored, by_numpy = site.time(
        Task(forward),
        Task(lambda: walk(full=True)),
        Task(lambda: walk(full=False)),
        Task(prune),
        Task(prune_by_sort),
        Task(score),
        Task(score_by_numpy),
    )
    whole, published = ([a + b for a, b in zip(walked, taken, strict=True)] for taken in (pruned, sorted_))
    reference = f"bare forward of {windows_BT.numel()} calibration tokens, without logits"
    return [
        site.compare("wanda", "mean squares, then Wanda's masks of all layers", whole, reference, bare, 1.3),
        site.compare("wanda/squares", "of this, the walk with mean squares", walked, reference, bare),
        site.compare("wanda/masks", "of this, the masks and masked weights", pruned, reference, bare),
        site.compare("wanda/moments", "not of this: the walk with full second moments", full, reference, bare),
        site.compare("wanda/published", "the whole of it", whole, "the same with masks by a stable sort", published),
        site.compare("wanda/score", "the 10th percentile of each layer", scored, "numpy's percentile", by_numpy),
    ]


def bench_profile(site: Site) -> list[Result]:
    """The whole profile, with KL curves of every layer, against one back-propagation of the same windows."""
    bench = site.bench
    windows_BT = site.calibration_BT[: site.settings.gradient_windows]

    def profile() -> None:
        collect_profile(site, Blocks(bench.model), windows_BT)

    bench.restore(DENSE)
    taken, bare = site.time(Task(profile), Task(lambda: back_propagate(bench.model, bench.layers, windows_BT)))
    what = (
        f"statistics, gradient scores and KL curves of {len(bench.layers)} layers, all from {windows_BT.numel()} tokens"
    )
    reference = "bare forward and backward of these tokens' loss, to the gradients of the layers' weights"
    return [site.compare("profile", what, taken, reference, bare, 4.0)]


def collect_profile(site: Site, blocks: Blocks, windows_BT: Tensor) -> None:
    """All that a profile knows, from these windows and the gradients of as many of them as the settings say."""
    bench, settings = site.bench, site.settings
    count, lead = min(settings.gradient_windows, len(windows_BT)), bench.windows.lead
    team, extent = work_alone(blocks, bench.layers, windows_BT, count, settings.seed, bench.directory, lead=lead)
    collect_statistics(team, extent, bench.layers, ignore_progress, lambda name, moment_II: None)


def back_propagate(model: Any, layers: Sequence[Layer], windows_BT: Tensor) -> None:
    """The language modelling loss of each window, and its gradients at the layers' weights."""
    weights = list({id(layer.parameter): layer.parameter for layer in layers}.values())
    for weight in weights:
        weight.requires_grad_()
    try:
        for ids_T in windows_BT:
            loss = model(input_ids=ids_T[None], labels=ids_T[None], use_cache=False).loss
            torch.autograd.grad(loss, weights, allow_unused=True)  # an expert may see no token
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def bench_kappa_of_method(site: Site) -> list[Result]:
    """The KL curves of what the method refit really leaves, against pruning the model once by it."""
    bench, allocation = site.bench, site.share_out(SPARSITY)

    def forget() -> None:
        """Both are kept on disk and would only be read back."""
        bench.restore(DENSE)
        (bench.store.directory / "index.jsonl").unlink(missing_ok=True)

    taken, once = site.time(
        Task(lambda: bench.describe_layers(site.profile, REFIT, ignore_progress), forget),
        Task(lambda: bench.prune(site.profile, order_allocation(REFIT, allocation), ignore_progress), forget),
    )
    what = f"KL curves of the method refit, {len(LEVELS)} sparsities of every layer"
    return [site.compare("kappa-of-method", what, taken, "pruning the whole model once by refit", once)]
