"""What the READMEs say of speed, timed: each part in turn with its reference.

Shape suffixes: B windows, T tokens, O output features (rows), I input features (columns).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from billhook_kernels.guard import DAMPING
from billhook_kernels.masks import keep_highest, keep_highest_of_rows
from billhook_kernels.obs import prune_obs
from billhook_kernels.refit_steps import refit_in_steps
from billhook_kernels.statistics import add_second_moment
from tools.base.progress import ignore_progress
from tools.base.settings import TeamSettings
from tools.measure.losses import pass_blocks
from tools.models.blocks import Blocks
from tools.models.readout import CHUNK, compute_logits
from tools.plans.allocate import allocate
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation
from tools.statistics.collect import collect_statistics
from tools.statistics.requests import work_alone
from tools.workbench.bench import Workbench
from tools.workbench.moments import read_moment
from tools.workbench.store import DENSE


def remove_by_sort(score_RN: Tensor, sparsity: float) -> Tensor:
    """The mask (bool, True = goes) of the int(`sparsity` * N) lowest scores of each row, as Wanda's code makes it.

    arXiv 2306.11695, its authors' repository: a stable sort, and the first places scattered into a mask.
    """
    order_RN = torch.sort(score_RN, dim=-1, stable=True).indices
    goes_RN = torch.zeros_like(score_RN, dtype=torch.bool)
    return goes_RN.scatter_(1, order_RN[:, : int(sparsity * score_RN.shape[1])], True)


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


SPARSITY = 0.5
"""Share of weights that go, wherever something is pruned."""

SIDES = (2048, 4096)
"""Of the square layers that masks, SparseGPT and kernels of a GPU are timed on."""

UPDATED = Recipe(method="sparsegpt", refit=False, allocation="uniform", statistics="dense")
REFIT = Recipe(method="refit", refit=False, allocation="kappa", curves="mask", statistics="dense")
WANDA = Recipe(method="wanda", refit=False, allocation="uniform", statistics="dense")


def _with_default(name: str, value: int) -> Any:
    field = copy(TeamSettings.model_fields[name])
    field.default = value
    return field


class BenchSettings(TeamSettings):
    """The model, its texts, and how often each thing is timed."""

    one_text = "speed is that of one"

    window: int = _with_default("window", 384)
    calibration_windows: int = _with_default("calibration_windows", 12)
    gradient_windows: int = _with_default("gradient_windows", 2)
    validation_windows: int = _with_default("validation_windows", 4)
    test_windows: int = _with_default("test_windows", 1)
    worker_threads: int = _with_default("worker_threads", 1)
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


class Result(NamedTuple):
    """One thing timed against another, in the same rounds."""

    name: str
    what: str
    reference: str
    seconds: Sequence[float]
    reference_seconds: Sequence[float]


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
        return self.bench.profile(ignore_progress)

    def prune(self, recipe: Recipe, sparsity: float = SPARSITY) -> str:
        """The checkpoint of the same sparsity in every layer."""
        shares = allocate(self.bench.profiles.read(self.profile).layers, sparsity, UPDATED)
        return self.bench.pruner.prune(self.profile, order_allocation(recipe, shares), ignore_progress)

    def forget(self) -> None:
        """The dense model again, and nothing on disk that would only be read back."""
        self.bench.pruner.restore(DENSE)
        (self.bench.store.directory / "index.jsonl").unlink(missing_ok=True)
        self.validate(None)

    def validate(self, checkpoint: str | None) -> None:
        """Validate a checkpoint anew; None only forgets what validations came to."""
        for path in (self.bench.directory / "evaluations").glob("*.json"):
            path.unlink()
        if checkpoint is not None:
            self.bench.evaluator.evaluate(checkpoint, "validation", self.profile, ignore_progress)

    def time(self, *tasks: Task) -> list[list[float]]:
        """The seconds of each task in each round; a round runs all tasks, one after another.

        The first round does not count where others follow: it makes the buffers and starts the threads of the rest.
        """
        seconds: list[list[float]] = [[] for _ in tasks]
        began = time.perf_counter()
        for _ in range(1 + self.settings.rounds):
            for task, taken in zip(tasks, seconds, strict=True):
                task.prepare()
                start = self._now()
                task.run()
                taken.append(self._now() - start)
            if time.perf_counter() - began > self.settings.round_seconds:
                break
        return [taken[1:] or taken for taken in seconds]

    def _now(self) -> float:
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize(self.bench.device)
        return time.perf_counter()


def bench_passes(site: Site) -> Iterator[Result]:
    """Profile and validation beside a bare forward, a round's refit beside SparseGPT's; the model may be streamed."""
    bench, blocks = site.bench, Blocks(site.bench.model)

    def profile() -> None:
        count, lead, windows_BT = site.settings.gradient_windows, bench.windows.lead, site.calibration_BT
        seed = site.settings.seed
        team, extent = work_alone(blocks, bench.weights.layers, windows_BT, count, seed, bench.directory, lead=lead)
        collect_statistics(team, extent, bench.weights.layers, ignore_progress, lambda name, moment_II: None)

    def read_out() -> None:
        for hidden_BTD in pass_blocks(blocks, bench.windows.validation.to(bench.device)).values():
            for chunk_TD in hidden_BTD[0].to(bench.device).split(CHUNK):
                compute_logits(bench.model, chunk_TD)

    bare, profiled, updated, refitted, passed, validated = site.time(
        Task(lambda: pass_blocks(blocks, site.calibration_BT), site.forget),
        Task(profile, site.forget),
        Task(lambda: site.prune(UPDATED), site.forget),
        Task(lambda: site.prune(REFIT), site.forget),
        Task(read_out, site.forget),
        Task(lambda: site.validate(DENSE), site.forget),
    )
    yield Result("profile", "profile", "bare forward, block by block, no logits", profiled, bare)
    yield Result("refit", "a round's refit of all layers", "SparseGPT's update", refitted, updated)
    yield Result("validation", "validation", "bare forward, block by block, logits", validated, passed)


def bench_masks(site: Site) -> Iterator[Result]:
    """Masks of each row's and the layer's lowest scores, beside the stable sort of Wanda's authors; second moments."""
    for side in SIDES:
        score_OI = make_layer(side, side, site.bench.device)[0].square()
        zeros, dead_OI = round(SPARSITY * score_OI.numel()), torch.zeros_like(score_OI, dtype=torch.bool)
        x_TI, total_II = score_OI[:512].to(torch.bfloat16), torch.zeros_like(score_OI)
        rows, by_rows, layer, by_layer, moment, by_torch = site.time(
            Task(partial(keep_highest_of_rows, score_OI, dead_OI, zeros)),
            Task(partial(remove_by_sort, score_OI, SPARSITY)),
            Task(partial(keep_highest, score_OI, dead_OI, zeros)),
            Task(partial(remove_by_sort, score_OI.reshape(1, -1), SPARSITY)),
            Task(partial(add_second_moment, total_II, x_TI)),
            Task(partial(_multiply_plainly, x_TI)),
        )
        what, sort = f"of {side} x {side} scores, fp32", "a stable sort of them and a scatter"
        yield Result(f"masks/{side}/rows", f"mask of each row's lowest {what}", sort, rows, by_rows)
        yield Result(f"masks/{side}/layer", f"mask of the lowest {what}", sort, layer, by_layer)
        what = f"second moment of {len(x_TI)} tokens, {side} inputs, bf16"
        yield Result(f"masks/{side}/moment", what, "x.float().T @ x.float()", moment, by_torch)


def _multiply_plainly(x_TI: Tensor) -> Tensor:
    return x_TI.float().T @ x_TI.float()


def bench_updates(site: Site) -> Iterator[Result]:
    """SparseGPT and the refit beside the published loop: on random layers, and over the model's own."""
    bench, shapes = site.bench, dict[tuple[int, ...], list[str]]()
    for side in SIDES:
        weight_OI, moment_II = make_layer(side, side, bench.device)
        ours, published = site.time(
            Task(partial(prune_obs, weight_OI, moment_II, round(SPARSITY * weight_OI.numel()))),
            Task(partial(prune_as_published, weight_OI, moment_II, SPARSITY)),
        )
        yield Result(f"obs/{side}", f"SparseGPT, {side} x {side}, fp32", "the published loop", ours, published)
    for layer in bench.weights.layers:
        shapes.setdefault(tuple(layer.weight_OI.shape), []).append(layer.name)
    stored, totals = bench.profiles.read(site.profile), []
    for members in shapes.values():
        name = members[len(members) // 2]
        weight_OI = bench.weights.dense[name].to(bench.device)
        moment_II = read_moment(bench.store, stored.moments[stored.group[name]], bench.device)
        gamma_O = bench.store.read_tensors(stored.means)[f"plain/{name}"].to(bench.device)
        zeros = round(SPARSITY * weight_OI.numel())
        timed = site.time(
            Task(partial(refit_in_steps, weight_OI, moment_II, gamma_O, zeros)),
            Task(partial(prune_obs, weight_OI, moment_II, zeros)),
            Task(partial(prune_as_published, weight_OI, moment_II, SPARSITY)),
        )
        totals.append([[len(members) * taken for taken in seconds] for seconds in timed])
    # Every round of the model is the sum of the shapes' rounds; a slow shape may have fewer of them.
    refit, obs, published = (
        [sum(taken) for taken in zip(*seconds, strict=False)] for seconds in zip(*totals, strict=True)
    )
    what = f"{len(bench.weights.layers)} layers: each shape's time as often as it occurs"
    yield Result("refit/obs", f"refit in steps, {what}", "SparseGPT, ours", refit, obs)
    yield Result("refit/published", f"refit in steps, {what}", "SparseGPT, the published loop", refit, published)
    yield Result("obs/model", f"SparseGPT, {what}", "the published loop", obs, published)


def make_layer(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weight (O, I), second moment (I, I)), random, fp32: inputs that move together, every ninth a loud one."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=generator)
    mix_IK = torch.randn(columns, max(1, columns // 8), generator=generator)
    mix_IK[::9] *= 5
    moment_II = mix_IK @ mix_IK.T / mix_IK.shape[1]
    moment_II.diagonal().add_(0.1)
    return weight_OI.to(device), moment_II.to(device)


def bench_workers(site: Site) -> Iterator[Result]:
    """Profile and validation by all workers, beside the same by one of them."""
    cluster = site.bench.crew.cluster
    assert cluster is not None
    one, other = site.prune(WANDA), site.prune(WANDA, SPARSITY - 0.1)
    count = cluster.size

    def task(used: int, run: Callable[[], object]) -> Task:
        def prepare() -> None:
            cluster.use(count)
            site.validate(other)  # so that no block's weights are those that the task begins with
            site.bench.pruner.restore(one)  # as after a prune; layers have yet to travel to the workers
            cluster.use(used)

        return Task(run, prepare)

    for name, run in (
        ("profile", lambda: site.bench.profile(ignore_progress)),
        ("validation", lambda: site.validate(one)),
    ):
        several, alone = site.time(task(count, run), task(1, run))
        yield Result(f"workers/{name}", f"{name} by {count} workers", "the same by one of them", several, alone)


BENCHMARKS: Mapping[str, Callable[[Site], Iterator[Result]]] = {
    "passes": bench_passes,
    "masks": bench_masks,
    "updates": bench_updates,
}
"""What is timed by name; with workers it is `bench_workers`."""
