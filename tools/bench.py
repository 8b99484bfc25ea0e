"""What does each part of pruning cost? `python -m tools.bench --json bench.json --only wanda,obs`

Every figure is a ratio: a part is timed in turn with its reference, in the same process and the same minute, and the
ratio is taken pair by pair. So it holds on another machine better than seconds do, and its spread shows how quiet the
machine was. The defaults take some minutes with a small model; windows and rounds scale them up. The work goes into a
temporary directory (TMPDIR). A missed target is shown, and is no failure of the command.

Shape suffixes: B windows, T tokens, O output features (rows), I input features (columns).
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.masks import keep_highest, keep_highest_of_rows
from kernels.methods import LayerStatistics, prune_weight
from kernels.obs import prune_obs
from kernels.preconditioner import DAMPING
from kernels.refit_steps import refit_in_steps
from kernels.scores import score_wanda
from tools.base.errors import UserError
from tools.base.files import write_json
from tools.base.options import Parser, add_flags, parse_flags, read_options, refuse
from tools.base.settings import TeamSettings, WorkbenchSettings
from tools.experiments.decoding import DECODED, PROMPT, describe_difference, open_pair
from tools.measure.losses import evaluate_windows
from tools.models.blocks import Blocks
from tools.models.layers import Layer
from tools.models.readout import compute_hidden
from tools.plans.allocate import Allocation, allocate
from tools.plans.layer_profile import LEVELS, LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation
from tools.results.schema import describe_protocol
from tools.statistics.collect import begin_walk, collect_moments, collect_statistics, work_alone
from tools.statistics.shards import SHARDS
from tools.statistics.walks import layers_by_block
from tools.workbench.bench import DENSE, Workbench, close_workbench, use_workbench

SPARSITY = 0.5
"""Share of weights that go, wherever something is pruned."""

OTHER_SPARSITY = 0.4
"""For checkpoints that shall differ from it, in which less goes."""

ALLOCATED_LAYERS = 400

MASKS, OBS = 1 / 10, 1 / 3
"""Seconds of a mask of 4096 x 4096 and of SparseGPT on 2048 x 2048, of what their authors published."""

DECODE = 0.714
"""Seconds of packed decoding, of dense decoding: 1.4 times as many tokens a second."""

REFIT = Recipe(method="refit", refit=False, allocation="kappa", curves="method")
UPDATED = Recipe(method="sparsegpt", refit=False, allocation="uniform")
"""The cheapest recipe whose layers are stored as those of a refit: mask and values."""


def _with_default(name: str, value: int) -> Any:
    field = copy(WorkbenchSettings.model_fields[name])
    field.default = value
    return field


class BenchSettings(WorkbenchSettings):
    """The model, its texts, and how often each thing is timed."""

    window: int = _with_default("window", 384)
    calibration_windows: int = _with_default("calibration_windows", 12)
    gradient_windows: int = _with_default("gradient_windows", 2)
    validation_windows: int = _with_default("validation_windows", 4)
    test_windows: int = _with_default("test_windows", 1)
    rounds: int = Field(
        3,
        ge=1,
        le=1000,
        description="How often each thing is timed, in turn with its reference, after a first round that warms up.",
    )
    round_seconds: float = Field(
        20.0,
        ge=0,
        description="No further round of a measurement begins after this long; where the first is all there is, it "
        "counts.",
    )
    obs_sizes: list[int] = Field(
        [2048, 4096],
        min_length=1,
        description="Sides of the square layers of the benchmarks masks and obs, comma-separated.",
    )

    @field_validator("obs_sizes", mode="before")
    @classmethod
    def _split_sizes(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("obs_sizes")
    @classmethod
    def _check_sizes(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ValueError("a layer has at least one row and column")
        return value


class Result(BaseModel):
    """One thing timed against another."""

    name: str = Field(description="The benchmark, then what distinguishes its rows.")
    what: str = Field(description="What was timed.")
    reference: str = Field(description="What it was timed against.")
    seconds: list[float] = Field(description="Of each round.")
    reference_seconds: list[float]
    ratio: float = Field(description="Median over the rounds of seconds / reference_seconds.")
    low: float = Field(description="The least of these ratios.")
    high: float = Field(description="The greatest.")
    target: float | None = Field(description="What the ratio should not exceed; null where nothing was promised.")
    peak_memory_bytes: int = Field(description="The most memory that the process had used by then.")


class Report(BaseModel):
    """`--json`."""

    settings: dict[str, Any]
    device: str
    threads: int = Field(description="Threads that torch uses on the processor.")
    versions: dict[str, str]
    results: list[Result] = []


class Task(NamedTuple):
    """Something to time; `prepare` goes before it each time, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


class Site:
    """The opened workbench, and what several benchmarks need of it."""

    def __init__(self, bench: Workbench, settings: BenchSettings) -> None:
        self.bench, self.settings = bench, settings
        self.calibration_BT = bench.windows.calibration.to(bench.device)

    @cached_property
    def profile(self) -> str:
        """Id of the dense model's profile."""
        return self.bench.profile(_ignore)

    def share_out(self, sparsity: float) -> Allocation:
        """The same sparsity in every layer."""
        return allocate(self.bench.read_profile(self.profile).layers, sparsity, UPDATED)

    def read_statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, gamma) of a layer."""
        stored, store = self.bench.read_profile(self.profile), self.bench.store
        moment_II = store.read_tensors(stored.moments[stored.group[name]])["A"]
        return moment_II.to(self.bench.device), store.read_tensors(stored.means)[f"plain/{name}"].to(self.bench.device)

    def time(self, *tasks: Task) -> list[list[float]]:
        """The seconds of each task in each round, as `time_in_turn` takes them."""
        return time_in_turn(tasks, self.settings, self._now)

    def _now(self) -> float:
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize(self.bench.device)
        return time.perf_counter()

    def compare(
        self,
        name: str,
        what: str,
        seconds: Sequence[float],
        reference: str,
        reference_seconds: Sequence[float],
        target: float | None = None,
    ) -> Result:
        """The result of two tasks timed in the same rounds."""
        return compare_rounds(name, what, seconds, reference, reference_seconds, target, self.bench.peak_memory_bytes())


def time_in_turn(
    tasks: Sequence[Task], settings: BenchSettings, now: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """The seconds of each task in each round; a round runs all tasks, one after another.

    The first round does not count where others follow: it makes the buffers and starts the threads of the rest.
    """
    seconds: list[list[float]] = [[] for _ in tasks]
    began = time.perf_counter()
    for _ in range(1 + settings.rounds):
        for task, taken in zip(tasks, seconds, strict=True):
            task.prepare()
            start = now()
            task.run()
            taken.append(now() - start)
        if time.perf_counter() - began > settings.round_seconds:
            break
    return [taken[1:] or taken for taken in seconds]


def compare_rounds(
    name: str,
    what: str,
    seconds: Sequence[float],
    reference: str,
    reference_seconds: Sequence[float],
    target: float | None,
    peak_memory_bytes: int,
) -> Result:
    """The result of two tasks timed in the same rounds."""
    ratios = [taken / other for taken, other in zip(seconds, reference_seconds, strict=True)]
    return Result(
        name=name,
        what=what,
        reference=reference,
        seconds=list(seconds),
        reference_seconds=list(reference_seconds),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=target,
        peak_memory_bytes=peak_memory_bytes,
    )


# --- the benchmarks ----------------------------------------------------------------------------------------------


def bench_wanda(site: Site) -> list[Result]:
    """Wanda in one shot, against a forward of its calibration text.

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
        team, extent = work_alone(blocks, bench.layers, windows_BT, 0, 0, bench.directory)
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

    bench.restore(DENSE)
    bare, full, walked, pruned, sorted_ = site.time(
        Task(forward), Task(lambda: walk(full=True)), Task(lambda: walk(full=False)), Task(prune), Task(prune_by_sort)
    )
    whole, published = ([a + b for a, b in zip(walked, taken, strict=True)] for taken in (pruned, sorted_))
    reference = f"bare forward of {windows_BT.numel()} calibration tokens, without logits"
    return [
        site.compare("wanda", "mean squares, then Wanda's masks of all layers", whole, reference, bare, 1.3),
        site.compare("wanda/squares", "of this, the walk with mean squares", walked, reference, bare),
        site.compare("wanda/masks", "of this, the masks and masked weights", pruned, reference, bare),
        site.compare("wanda/moments", "not of this: the walk with full second moments", full, reference, bare),
        site.compare("wanda/published", "the whole of it", whole, "the same with masks by a stable sort", published),
    ]


def bench_profile(site: Site) -> list[Result]:
    """The whole profile, with KL curves of every layer, against one back-propagation of the same windows."""
    bench, seed = site.bench, site.settings.seed
    windows_BT = site.calibration_BT[: site.settings.gradient_windows]

    def profile() -> None:
        blocks = Blocks(bench.model)
        team, extent = work_alone(blocks, bench.layers, windows_BT, len(windows_BT), seed, bench.directory)
        collect_statistics(team, extent, bench.layers, _ignore, lambda name, moment_II: None)

    bench.restore(DENSE)
    taken, bare = site.time(Task(profile), Task(lambda: back_propagate(bench.model, bench.layers, windows_BT)))
    what = (
        f"statistics, gradient scores and KL curves of {len(bench.layers)} layers, all from {windows_BT.numel()} tokens"
    )
    reference = "bare forward and backward of these tokens' loss, to the gradients of the layers' weights"
    return [site.compare("profile", what, taken, reference, bare, 4.0)]


def back_propagate(model: Any, layers: Sequence[Layer], windows_BT: Tensor) -> None:
    """The language modelling loss of each window, and its gradients at the layers' weights."""
    weights = [layer.module.get_parameter("weight") for layer in layers]
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
        Task(lambda: bench.describe_layers(site.profile, REFIT, _ignore), forget),
        Task(lambda: bench.prune(site.profile, order_allocation(REFIT, allocation), _ignore), forget),
    )
    what = f"KL curves of the method refit, {len(LEVELS)} sparsities of every layer"
    return [site.compare("kappa-of-method", what, taken, "pruning the whole model once by refit", once)]


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


def remove_by_sort(score_RN: Tensor, sparsity: float) -> Tensor:
    """The mask (bool, True = goes) of the int(`sparsity` * N) lowest scores of each row, as Wanda's code makes it.

    arXiv 2306.11695, its authors' repository: a stable sort, and the first places scattered into a mask.
    """
    order_RN = torch.sort(score_RN, dim=-1, stable=True).indices
    goes_RN = torch.zeros_like(score_RN, dtype=torch.bool)
    return goes_RN.scatter_(1, order_RN[:, : int(sparsity * score_RN.shape[1])], True)


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


def prune_as_published(weight_OI: Tensor, second_moment_II: Tensor, sparsity: float, block: int = 128) -> Tensor:
    """SparseGPT as its paper has it (arXiv 2301.00774, algorithm 1), in the dtype of the weight.

    One column after another in blocks of `block`; the mask of a block by a sort of W^2 / U_jj^2, when the loop comes
    to it; the columns to the right of the block by one product at its end. U is the upper Cholesky factor of the
    inverse, from three calls (cholesky, cholesky_inverse, cholesky), damping and dead columns as in the authors' code.
    Every block loses int(`sparsity` * its size) weights, more only where scores tie.
    """
    work_OI, hessian_II = weight_OI.float().clone(), second_moment_II.float().clone()
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1
    work_OI[:, dead_I] = 0
    diagonal_I += DAMPING * diagonal_I.mean()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    columns = work_OI.shape[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        work_OB, upper_BB = work_OI[:, start:end], upper_II[start:end, start:end]
        score_OB = work_OB.square() / upper_BB.diagonal().square()
        threshold = score_OB.flatten().sort().values[int(sparsity * score_OB.numel())]
        goes_OB = score_OB < threshold
        error_OB = torch.zeros_like(work_OB)
        for j in range(end - start):
            error_OB[:, j] = work_OB[:, j] / upper_BB[j, j] * goes_OB[:, j]
            work_OB[:, j:] -= torch.outer(error_OB[:, j], upper_BB[j, j:])
        work_OB[goes_OB] = 0
        work_OI[:, end:] -= error_OB @ upper_II[start:end, end:]
    return work_OI.to(weight_OI.dtype)


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


def bench_allocation(site: Site) -> list[Result]:
    """Sharing sparsity out over many layers, against a second."""
    layers = make_profiles(ALLOCATED_LAYERS)
    recipe = Recipe(allocation="kappa", strength=0.8)
    (taken,) = site.time(Task(lambda: allocate(layers, SPARSITY, recipe, max_layer_sparsity=0.9)))
    what = f"allocation of {SPARSITY:.0%} over {len(layers)} layers by their KL curves"
    return [site.compare("allocation", what, taken, "one second", [1.0] * len(taken), 1.0)]


def make_profiles(count: int) -> list[LayerProfile]:
    """Made-up layers, seven to a block, whose KL curves differ in height and slope."""
    random = np.random.default_rng(0)
    return [
        LayerProfile(
            name=f"layers.{i // 7}.{i % 7}",
            block=i // 7,
            kind=str(i % 7),
            weights=int(random.integers(1, 64)) * 2**18,
            zeros=0,
            wanda=1.0,
            wanda_z=0.0,
            gradient=1.0,
            gradient_z=0.0,
            kappa=list(random.lognormal(-6, 1) * np.array(LEVELS) ** random.uniform(2, 4)),
        )
        for i in range(count)
    ]


def bench_validation(site: Site) -> list[Result]:
    """Rollbacks, and a validation that starts where the weights differ, against a validation of the whole model."""
    bench, blocks = site.bench, len(Blocks(site.bench.model))
    windows_BT = bench.windows.validation.to(bench.device)
    third = 2 * blocks // 3
    allocation, other = site.share_out(SPARSITY), site.share_out(OTHER_SPARSITY).zeros

    def prune(first: int) -> str:
        """The checkpoint in which blocks from `first` on are pruned less."""
        less = {layer.name: other[layer.name] for layer in bench.layers if layer.block >= first}
        changed = allocation.model_copy(update={"zeros": allocation.zeros | less})
        return bench.prune(site.profile, order_allocation(UPDATED, changed), _ignore)

    all_alike, last_third, last_block = prune(blocks), prune(third), prune(blocks - 1)
    hidden_BTD = bench.store.read_tensors(bench.read_profile(site.profile).hidden)["hidden"]

    def forget() -> None:
        for path in (bench.directory / "evaluations").glob("*.json"):
            path.unlink()

    def change_last_third() -> None:
        forget()
        bench.evaluate(all_alike, "validation", site.profile, _ignore)
        bench.restore(last_third)

    full, cached, everything, block = site.time(
        Task(lambda: evaluate_windows(bench.model, windows_BT, hidden_BTD, "", _ignore)),
        Task(lambda: bench.evaluate(last_third, "validation", site.profile, _ignore), change_last_third),
        Task(lambda: bench.restore(all_alike), lambda: bench.restore(DENSE)),
        Task(lambda: bench.restore(all_alike), lambda: bench.restore(last_block)),
    )
    reference = f"full validation, {windows_BT.numel()} tokens"
    tail = f"validation when only blocks {third} to {blocks - 1} of {blocks} changed"
    return [
        site.compare("validation/last-third", tail, cached, reference, full),
        site.compare("rollback/all", "rollback in which every layer differs", everything, reference, full),
        site.compare("rollback/last-block", "rollback in which the last block differs", block, reference, full),
    ]


def bench_decode(source: str, settings: BenchSettings) -> Result:
    """Greedy decoding with packed layers against the same model with dense ones, bf16, one sequence, on the CPU."""
    pair = open_pair(source)
    difference = describe_difference(pair)
    packed, dense = time_in_turn(
        [
            Task(pair.decode, lambda: pair.install(pair.packed)),
            Task(pair.decode, lambda: pair.install(pair.dense)),
        ],
        settings,
    )
    what = f"{DECODED} tokens after {PROMPT}, {len(pair.packed)} layers packed: {pair.share:.3f} of their dense bytes; "
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return compare_rounds("decode", what + difference, packed, "the same with dense layers, bf16", dense, DECODE, peak)


def bench_workers(bench: Workbench, settings: BenchSettings, workers: int) -> list[Result]:
    """Profile and validation by several workers, against the same by one of them."""
    cluster = bench.cluster
    assert cluster is not None
    profile = bench.profile(_ignore)
    layers, recipe = bench.read_profile(profile).layers, Recipe(method="wanda", refit=False, allocation="uniform")
    one, other = (
        bench.prune(profile, order_allocation(recipe, allocate(layers, share, recipe)), _ignore)
        for share in (SPARSITY, OTHER_SPARSITY)
    )
    busy: dict[tuple[str, int], float] = {}

    def validate(checkpoint: str) -> None:
        for path in (bench.directory / "evaluations").glob("*.json"):
            path.unlink()
        bench.evaluate(checkpoint, "validation", profile, _ignore)

    def task(name: str, count: int, run: Callable[[], object]) -> Task:
        def prepare() -> None:
            cluster.use(workers)
            validate(other)  # so that no block's weights are those that the task begins with
            bench.restore(one)  # as after a prune; layers have yet to travel to the workers
            cluster.use(count)
            cluster.take_busy_seconds()

        def work() -> None:
            run()
            busy[name, count] = cluster.take_busy_seconds()

        return Task(work, prepare)

    results = []
    tasks: dict[str, Callable[[], object]] = {
        "profile": lambda: bench.profile(_ignore),
        "validation": lambda: validate(one),
    }
    for name, run in tasks.items():
        several, alone = time_in_turn([task(name, count, run) for count in (workers, 1)], settings)
        outside = 1 - busy[name, workers] / (workers * several[-1])
        what = f"{name} by {workers} workers of one thread each; {outside:.0%} of their time was not spent on the text"
        peak = bench.peak_memory_bytes()
        results.append(compare_rounds(f"workers/{name}", what, several, "the same by one of them", alone, None, peak))
    return results


BENCHMARKS: dict[str, Callable[[Site], list[Result]]] = {
    "wanda": bench_wanda,
    "profile": bench_profile,
    "kappa-of-method": bench_kappa_of_method,
    "masks": bench_masks,
    "obs": bench_obs,
    "refit": bench_refit,
    "allocation": bench_allocation,
    "validation": bench_validation,
}


def _ignore(label: str, done: int, total: int) -> None:
    """No progress bar: it would be timed too."""


# --- the command -------------------------------------------------------------------------------------------------


def choose_benchmarks(only: str) -> list[str]:
    """The names asked for, in the order of BENCHMARKS; all for "". Raises UserError in one line for an unknown one."""
    asked = {name.strip() for name in only.split(",") if name.strip()}
    for name in sorted(asked - set(BENCHMARKS)):
        raise UserError(f"there is no benchmark {name[:80]!r}; choose from {', '.join(BENCHMARKS)}")
    return [name for name in BENCHMARKS if name in asked or not asked]


def run_benchmarks(
    settings: BenchSettings, names: Sequence[str], path: Path | None, report: Report, console: Console
) -> None:
    """Run benchmarks one after another into the report; `path` is written after each. Raises UserError."""

    def warn(text: str) -> None:
        console.print(f"warning: {text}", highlight=False, markup=False)

    _write(report, path)  # before minutes of work: can it be written at all?
    with tempfile.TemporaryDirectory(prefix="billhook-bench-") as directory, console.status("load model") as status:
        try:
            with use_workbench(settings, Path(directory), warn, _ignore) as bench:
                _refuse_sparse(bench)
                site = Site(bench, settings)
                if bench.device.type == "cuda":
                    report.device = torch.cuda.get_device_name(bench.device)
                for name in names:
                    status.update(name)
                    report.results += BENCHMARKS[name](site)
                    _write(report, path)
        finally:
            close_workbench()


def run_workers(settings: BenchSettings, workers: int, console: Console) -> list[Result]:
    """`bench_workers`, in a temporary directory. Raises UserError without Ray, or where it cannot be begun."""
    team = TeamSettings.model_validate(
        settings.model_dump(include=set(WorkbenchSettings.model_fields))
        | {"workers": str(workers), "worker_threads": 1}
    )

    def warn(text: str) -> None:
        console.print(f"warning: {text}", highlight=False, markup=False)

    with tempfile.TemporaryDirectory(prefix="billhook-bench-") as directory, console.status("workers"):
        try:
            with use_workbench(team, Path(directory), warn, _ignore) as bench:
                return bench_workers(bench, settings, workers)
        finally:
            close_workbench()


def _refuse_sparse(bench: Workbench) -> None:
    for layer, zeros in zip(bench.layers, bench.sparsities(), strict=True):
        if zeros > OTHER_SPARSITY:
            raise UserError(f"layer {layer.name} is {zeros:.0%} zero already; the benchmarks prune a dense model")


def _write(report: Report, path: Path | None) -> None:
    if path is None:
        return
    try:
        write_json(path, report.model_dump())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def show_report(report: Report, console: Console) -> None:
    """The results as a table: medians over the rounds, and under a ratio its least and greatest and their number."""
    table = Table(show_lines=True)
    table.add_column("benchmark", no_wrap=True)
    table.add_column("what is timed, and against what")
    for title in ("seconds", "ratio", "at most", "peak"):
        table.add_column(title, justify="right")
    for result in report.results:
        medians = statistics.median(result.seconds), statistics.median(result.reference_seconds)
        table.add_row(
            result.name,
            f"{result.what}\nagainst {result.reference}",
            " / ".join(f"{seconds:.3g}" for seconds in medians),
            f"{result.ratio:.3g}\n{result.low:.3g} to {result.high:.3g} of {len(result.seconds)}",
            describe_target(result),
            f"{result.peak_memory_bytes / 1e9:.2f} GB",
        )
    console.print(f"{report.settings['model']}, {report.settings['dtype']}, {report.device}, {report.threads} threads")
    console.print(table)


def describe_target(result: Result) -> str:
    """The target, and whether it was met; empty where there is none."""
    if result.target is None:
        return ""
    return f"{result.target:.3g} ({'met' if result.ratio <= result.target else 'missed'})"


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (what is done is shown), 2 bad input."""
    parser = Parser(prog="python -m tools.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="Write all figures there too.")
    parser.add_argument(
        "--only", metavar="NAME,...", default="", help=f"Benchmarks to run: {', '.join(BENCHMARKS)}. Default: all."
    )
    parser.add_argument(
        "--decode",
        metavar="MODEL",
        help="Time only this: a model or run decodes, with packed layers against dense ones, in bf16. Where it is "
        "dense, 45 %% of its weights are set to zero; a directory with only a config.json gets random weights.",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        choices=range(2, SHARDS + 1),
        help="Time only this: profile and validation by N workers of one thread, on Ray, against one of them.",
    )
    add_flags(parser, BenchSettings)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has room for sentences
    try:
        options, flags = parse_flags(parser, BenchSettings, sys.argv[1:] if arguments is None else arguments)
        names, settings = choose_benchmarks(options.only), read_options(BenchSettings, flags, None)
        report = Report(
            settings=settings.model_dump(),
            device="cpu",
            threads=torch.get_num_threads(),
            versions=describe_protocol(settings, "validation").versions,
        )
        path = Path(options.json) if options.json else None
        if sum(map(bool, (options.decode, options.only, options.workers))) > 1:
            raise UserError("--decode, --workers and --only exclude one another")
        try:
            if options.decode:
                report.settings |= {"model": options.decode, "dtype": "bf16", "device": "cpu"}
                _write(report, path)
                report.results.append(bench_decode(options.decode, settings))
                _write(report, path)
            elif options.workers:
                report.results += run_workers(settings, options.workers, console)
                _write(report, path)
            else:
                run_benchmarks(settings, names, path, report, console)
        finally:
            if report.results:
                show_report(report, console)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
