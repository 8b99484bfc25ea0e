"""Seconds of every step of a run, from one block of each kind really run on the device, on random weights and tokens.

What a step takes is a line over the tokens of a window, through a short window and a longer one: as long as the run's
where walks through it take no more than `BUDGET` seconds. Each step of one block, or of the output head, is Billhook's
own code; how often a run takes it is for `tools.estimate.work` to say.

Shape suffixes: T tokens, D hidden width.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from billhook_kernels.triangle import count_triangle
from tools.base.files import hash_file
from tools.estimate.block import Sample, build_sample, only_head
from tools.estimate.clock import Fit, fit, time_call
from tools.estimate.pruning import count_layers, time_layers
from tools.models.layers import Layer
from tools.models.readout import measure_losses
from tools.plans.layer_profile import LEVELS
from tools.plans.recipe import Recipe
from tools.statistics.known import ModelStatistics
from tools.statistics.table import build_profile
from tools.statistics.walk import Walk
from tools.statistics.walks import Walks
from tools.texts.written import BATCH

BUDGET = 10.0
"""Seconds that walks through one block of each kind may take, and the pruning of layers of each form by a recipe."""

REPEATS = 3
"""Walks through the longer window, of which the median counts, where they are short enough."""

SHORT = 32
"""Tokens of the shorter window."""

LEVER = 8
"""The longer window is at least so many times as long."""

WRITTEN = 2**25
"""Bytes of the file that shows how fast artifacts are written and read."""


class Steps(NamedTuple):
    """Seconds that all blocks of the model take; for one window of text where nothing else is said."""

    forward: float
    statistics: float
    """A forward with the second moments of what layers read."""
    gradients: float
    """A forward and two backwards, with the output head's."""
    curves: Fit
    """What the two-sided mask costs at all levels, over the number of windows."""
    loss: float
    """The output head, for the losses of the dense model."""
    divergence: float
    """The output head, for the losses beside the dense model's."""
    describe: float
    """The table of layers, once."""
    word: float
    """A forward of one token of each prompt, once."""
    write: float
    """Writing a window of text, one of a batch, without what attention reads of the cache."""


class Times(NamedTuple):
    """All that was timed."""

    steps: Steps
    prune: dict[str, float]
    """Seconds for all layers of the model to be pruned once, by the name of the recipe."""
    cut: dict[str, float]
    """Likewise to all of LEVELS."""
    write: float
    """A byte, hashed and written to a file."""
    read: float
    """A byte, read and checked."""
    moments: int
    """Bytes of the second moments of all layers on disk, one for those that read the same."""
    tokens: int
    """Of the longest window that was really run."""


def time_run(
    model: Any, window: int, device: torch.device, prompts: int, prune: Mapping[str, Recipe], cut: Mapping[str, Recipe]
) -> Times:
    """Build one block of each kind of a model on the meta device with random weights, and time what a run does.

    Layers are pruned once by the recipes `prune`, and to all of LEVELS by those of `cut`, each under a name.
    """
    sample = build_sample(model, device)
    with tempfile.TemporaryDirectory() as directory:
        group = _find_groups(sample, device, Path(directory))
        steps, tokens = _time_steps(sample, window, device, Path(directory), prompts)
        write, read = _time_files(Path(directory))
    forms, widths = count_layers(sample.layers, group, lambda layer: sample.counts[layer.block])
    dtype, allowance = sample.layers[0].weight_OI.dtype, BUDGET / len(forms)
    time_all = partial(time_layers, forms=forms, widths=widths, dtype=dtype, device=device, allowance=allowance)
    return Times(
        steps=steps,
        prune={name: time_all(recipe, levels=False) for name, recipe in prune.items()},
        cut={name: time_all(recipe, levels=True) for name, recipe in cut.items()},
        write=write,
        read=read,
        moments=sum(4 * count_triangle(width) * count for width, count in widths.items()),
        tokens=tokens,
    )


# --- blocks --------------------------------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """Seconds of one walk through one window, all blocks of the model counted where one of each kind was run."""

    forward: float
    statistics: float
    gradients: float
    curves: float
    loss: float
    divergence: float


def _time_steps(sample: Sample, window: int, device: torch.device, scratch: Path, prompts: int) -> tuple[Steps, int]:
    """The steps, and the tokens of the longest window that was run."""
    lines, tokens = fit_windows(sample, window, device, lambda ids_T: _walk(sample, ids_T, device, scratch))
    at = _Pass(*(line.at(window) for line in lines))
    curves = lines[_Pass._fields.index("curves")]
    steps = Steps(
        forward=at.forward,
        statistics=at.statistics,
        gradients=at.gradients,
        curves=Fit(curves.fixed, curves.each * window),
        loss=at.loss,
        divergence=at.divergence,
        describe=_time_describing(sample, device),
        word=_time_word(sample, device, prompts),
        write=_time_word(sample, device, BATCH) * window / BATCH,
    )
    return steps, tokens


def fit_windows(
    sample: Sample, window: int, device: torch.device, walk: Callable[[Tensor], Sequence[float]]
) -> tuple[list[Fit], int]:
    """(the line of each of the seconds that a walk through one window gives, over its tokens; those of the longest).

    The walk is given a short window, and then as long a one as `BUDGET` allows, of `window` tokens at most; one of
    `LEVER` times as many in any case, for of wide blocks most of the time hangs on no token, and shorter windows would
    take its noise for theirs.
    """

    def take(tokens: int) -> tuple[Sequence[float], float]:
        ids_T = torch.arange(tokens, device=device) % len(sample.model.get_input_embeddings().weight)
        began = time.perf_counter()
        return walk(ids_T), time.perf_counter() - began

    few = min(SHORT, window)
    take(few)  # the first one also loads libraries
    short, spent = take(few)
    many = min(window, max(LEVER * few, int(few * BUDGET / spent)))
    runs: list[Sequence[float]] = []
    spent = 0.0
    while not runs or (len(runs) < REPEATS and spent + spent / len(runs) <= BUDGET):
        run, seconds = take(many)
        runs.append(run)
        spent += seconds
    long = [median(values) for values in zip(*runs, strict=True)]
    return [fit((few, before), (many, after)) for before, after in zip(short, long, strict=True)], many


def _walk(sample: Sample, ids_T: Tensor, device: torch.device, scratch: Path) -> _Pass:
    """One window on its way up through one block of each kind, and its gradients on their way down."""
    span, walk, last = (0, 1), Walk(0, "run"), len(sample.counts)
    walks = Walks(sample.blocks, sample.layers, ids_T[None], 1, 0, scratch)
    x_BTD = sample.blocks.embed(ids_T)
    with torch.no_grad():
        forward = _time_kinds(sample, device, lambda kind: sample.blocks.run(ids_T, kind, x_BTD))
    statistics = _time_kinds(sample, device, lambda kind: walks.moments(span, walk, kind, True, "profile"))
    walks.moments(span, walk, last, True, "profile")
    head = time_call(device, partial(walks.gradients, span, walk, last))
    gradients = curves = 0.0
    for kind, count in reversed(list(enumerate(sample.counts))):
        gradients += count * time_call(device, partial(walks.gradients, span, walk, kind))
        known = {layer.name: _make_known(layer) for layer in sample.members(kind)}
        curves += count * time_call(device, partial(walks.mask_curves, span, walk, kind, known))
    with only_head(sample, ids_T) as hidden_TD:
        loss = time_call(device, partial(measure_losses, sample.model, ids_T, None))
        divergence = time_call(device, partial(measure_losses, sample.model, ids_T, hidden_TD))
    words = sample.words
    return _Pass(forward, statistics, gradients + words * head, curves, words * loss, words * divergence)


def _time_kinds(sample: Sample, device: torch.device, run: Callable[[int], Any]) -> float:
    """Seconds for all blocks of the model, one of each kind being run."""
    return sum(count * time_call(device, partial(run, kind)) for kind, count in enumerate(sample.counts))


def _make_known(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    outputs, inputs = layer.weight_OI.shape
    return torch.empty(0), torch.ones(inputs), torch.ones(outputs)


def _time_word(sample: Sample, device: torch.device, prompts: int) -> float:
    """Of all blocks and the output head; most of it goes to reading their weights."""
    ids_T = torch.zeros(max(prompts, 1), dtype=torch.long, device=device)
    x_BTD, head = sample.blocks.embed(ids_T), sample.model.get_output_embeddings()
    with only_head(sample, ids_T) as hidden_TD:
        pass

    @torch.no_grad()
    def run() -> float:
        blocks = _time_kinds(sample, device, lambda kind: sample.blocks.run(ids_T, kind, x_BTD))
        return blocks + sample.words * time_call(device, partial(head, hidden_TD))

    return min(run() for _ in range(REPEATS))


def _time_describing(sample: Sample, device: torch.device) -> float:
    def describe(kind: int) -> None:
        members = sample.members(kind)
        names, curve = [layer.name for layer in members], [0.0] * len(LEVELS)
        known = {layer.name: _make_known(layer) for layer in members}
        inputs, outputs = ({name: known[name][i].to(device) for name in names} for i in (1, 2))
        group, scores = {name: name for name in names}, dict.fromkeys(names, 0.0)
        build_profile(members, ModelStatistics(inputs, outputs, outputs, group, scores, dict.fromkeys(names, curve)))

    return _time_kinds(sample, device, describe)


def _time_files(directory: Path) -> tuple[float, float]:
    """Seconds of a byte, written and read."""
    path, cpu = directory / "artifact.safetensors", torch.device("cpu")
    tensors = {"A": torch.ones(WRITTEN // 4)}
    save_file(tensors, path)  # the first one also loads the library
    check = time_call(cpu, partial(hash_file, path))
    write, read = time_call(cpu, partial(save_file, tensors, path)), time_call(cpu, partial(load_file, path))
    return (write + check) / WRITTEN, (read + check) / WRITTEN


# --- layers --------------------------------------------------------------------------------------------------------


def _find_groups(sample: Sample, device: torch.device, scratch: Path) -> dict[str, str]:
    """The first layer of each that read the same tensor."""
    ids_BT = torch.zeros(1, 8, dtype=torch.long, device=device)
    walks = Walks(sample.blocks, sample.layers, ids_BT, 1, 0, scratch)
    group: dict[str, str] = {}
    for kind in range(len(sample.counts)):
        group |= walks.moments((0, 1), Walk(0, "run"), kind, False, "moments")[1]
    return group
