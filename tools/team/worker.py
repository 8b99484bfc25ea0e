"""One worker of a team: a model of its own, the run's texts, and the work that is shared out, as plain methods.

Knows no Ray: `tools.team.cluster` moves what goes in and comes out, which is on the CPU.

Shape suffixes: B windows, T tokens, D hidden width, I input features, O output features.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

from kernels.guard import Pruned
from kernels.methods import LayerStatistics, prune_levels, prune_weight
from tools.base.settings import Split, WorkbenchSettings
from tools.measure.losses import PrefixCache, evaluate_windows
from tools.measure.recall import EncodedPair, cut_batches, read_answers
from tools.models.artifacts import pack_pruned, unpack_pruned
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.plans.layer_profile import LEVELS
from tools.plans.recipe import Recipe
from tools.statistics.shards import Span
from tools.statistics.walks import Nodes, Walk, Walks
from tools.texts.windows import Windows

ROOT = Path(__file__).resolve().parents[2]


class Texts(NamedTuple):
    """Tokens of all that is measured on."""

    windows: Windows
    questions: dict[Split, list[EncodedPair]]


class LayerWork(NamedTuple):
    """A layer to prune: its dense weights, and what is known of it."""

    name: str
    zeros: int
    dense_OI: Tensor
    mean_square_I: Tensor
    gradient_square_O: Tensor


class LayerResult(NamedTuple):
    """A pruned layer: the tensors of its artifact, and the damping that it took."""

    name: str
    tensors: dict[str, Tensor]
    damping: float


class Identity(BaseModel):
    """What must be the same everywhere for results to be the same bits."""

    billhook: str
    torch: str
    device: str
    model: str

    def explain_difference(self, other: "Identity") -> str:
        """What the other one has instead, in a few words; "" where it has all the same."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in type(self).model_fields)
        return ", ".join(f"{name} {theirs} instead of {ours}" for name, ours, theirs in pairs if ours != theirs)


def identify(model: Any) -> Identity:
    """This process: versions, with hashes of Billhook's own code and of the model's weights as they are now."""
    code, weights = hashlib.sha256(), hashlib.sha256()
    for path in sorted([*(ROOT / "kernels").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]):
        code.update(path.read_bytes())
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return Identity(
        billhook=f"{importlib.metadata.version('billhook')} ({code.hexdigest()[:12]})",
        torch=f"{torch.__version__} on {platform.machine()}",
        device=torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        model=f"with weights {weights.hexdigest()[:12]}",
    )


class Worker:
    """Owns one loaded model, which it is told to change layer by layer."""

    def __init__(self, model: Any, settings: WorkbenchSettings, texts: Texts, scratch: Path, prefix_bytes: int) -> None:
        """`prefix_bytes` may be kept of what blocks read of the whole validation text."""
        self.model, self.texts, self.device = model, texts, model.device
        self.blocks = Blocks(model)
        self.layers = {layer.name: layer for layer in find_layers(model)}
        calibration, mixed = texts.windows.calibration.to(self.device), texts.windows.mixed
        count = min(settings.gradient_windows, len(calibration))
        layers = list(self.layers.values())
        walks = Walks(self.blocks, layers, calibration, count, settings.seed, scratch, ahead=1, mixed=mixed)
        self.moments, self.gradients, self.finish = walks.moments, walks.gradients, walks.finish
        self.mask_curves, self._walks = walks.mask_curves, walks
        self._marks = [""] * len(self.blocks)
        self._prefix: dict[tuple[int, ...], PrefixCache] = {}
        self._prefix_bytes = prefix_bytes

    def install(self, weights: Mapping[str, Mapping[str, Tensor]], marks: Sequence[str]) -> None:
        """Put weights into layers, each as an artifact, or as its `dense` weights and what an artifact has of them.

        `marks[b]` then names the weights of all blocks before b.
        """
        for name, tensors in weights.items():
            layer = self.layers[name]
            layer.write(unpack_pruned(tensors, tensors.get("dense", layer.weight_OI)))
        self._marks = list(marks)

    def curves(self, span: Span, walk: Walk, block: int, parts: Sequence[Mapping[str, Sequence[Tensor]]]) -> Nodes:
        """As `Walks.curves`, of what `prune_to_levels` gave of all layers of the block."""
        return self._walks.curves(span, walk, block, {name: part for some in parts for name, part in some.items()})

    def losses(
        self, span: Span, split: str, windows: Sequence[int], dense_hidden_BTD: Tensor | None, keeps_hidden: bool
    ) -> tuple[list[float | None], list[float | None], Tensor | None]:
        """(nll, KL, hidden states) of those of the `windows` of a text that the span has, as `evaluate_windows`.

        `dense_hidden_BTD` are the dense model's hidden states of all of `windows`.
        """
        chosen = tuple(windows[slice(*span)])
        text_BT = getattr(self.texts.windows, split)[list(chosen)].to(self.device)
        dense_BTD = None if dense_hidden_BTD is None else dense_hidden_BTD[slice(*span)]
        prefix = (self._find_prefix(chosen, text_BT), self._marks) if split == "validation" else None
        evaluation, hidden_BTD = evaluate_windows(self.model, text_BT, dense_BTD, "", _ignore, prefix)
        return evaluation.nll, evaluation.kl, hidden_BTD if keeps_hidden else None

    def _find_prefix(self, chosen: tuple[int, ...], text_BT: Tensor) -> PrefixCache:
        """The cache of these windows of the validation text; it takes the place of one of other windows."""
        if chosen not in self._prefix:
            limit = self._prefix_bytes * len(chosen) // len(self.texts.windows.validation)
            self._prefix = {chosen: PrefixCache(self.blocks, text_BT, limit)}
        return self._prefix[chosen]

    def recall(self, span: Span, split: Split) -> list[float]:
        """Log-probabilities of the answers in the span's batches of a split's questions, batch after batch."""
        pairs = self.texts.questions[split]
        batches = cut_batches(pairs)[slice(*span)]
        return [value for batch in batches for value in read_answers(self.model, [pairs[i] for i in batch])]

    def prune(self, recipe: Recipe, layers: Sequence[LayerWork], moment_II: Tensor | None) -> list[LayerResult]:
        """Prune layers that read the same inputs, from their dense weights."""
        results = []
        for layer, statistics in self._with_statistics(layers, moment_II):
            pruned = prune_layer(recipe, layer.dense_OI.to(self.device), statistics, layer.zeros)
            tensors = pack_pruned(pruned.weight_OI, values=recipe.changes_survivors)
            results.append(LayerResult(layer.name, tensors, pruned.damping))
        return results

    def prune_to_levels(
        self, recipe: Recipe, layers: Sequence[LayerWork], moment_II: Tensor | None
    ) -> dict[str, list[Tensor]]:
        """What `cut_to_levels` gives of layers that read the same inputs."""
        return {
            layer.name: [part_OI.cpu() for part_OI in cut_to_levels(recipe, layer.dense_OI.to(self.device), statistics)]
            for layer, statistics in self._with_statistics(layers, moment_II)
        }

    def _with_statistics(
        self, layers: Sequence[LayerWork], moment_II: Tensor | None
    ) -> Iterator[tuple[LayerWork, LayerStatistics]]:
        moment_II = None if moment_II is None else moment_II.to(self.device)
        statistics: LayerStatistics | None = None
        for layer in layers:
            gamma_O = layer.gradient_square_O.to(self.device)
            if statistics is None or moment_II is None:
                statistics = LayerStatistics(layer.mean_square_I.to(self.device), gamma_O, moment_II)
            else:
                statistics = statistics.for_outputs(gamma_O)
            yield layer, statistics


def prune_layer(recipe: Recipe, dense_OI: Tensor, statistics: LayerStatistics, zeros: int) -> Pruned:
    """The layer as the recipe leaves it, with its damping."""
    return prune_weight(
        recipe.method,
        dense_OI,
        statistics,
        zeros,
        refit=recipe.refits_after,
        refit_steps=recipe.steps,
        pattern=recipe.group,
    )


def cut_to_levels(recipe: Recipe, dense_OI: Tensor, statistics: LayerStatistics) -> Iterator[Tensor]:
    """What the recipe's method changes of a layer at each of LEVELS beyond the last; fp32."""
    zeros = [round(level * dense_OI.numel()) for level in LEVELS]
    before_OI = dense_OI
    for pruned_OI in prune_levels(recipe.method, dense_OI, statistics, zeros, refit=recipe.refits_after):
        yield before_OI.float() - pruned_OI.float()
        before_OI = pruned_OI


def _ignore(label: str, done: int, total: int) -> None:
    """Progress is told by whoever shares the work out."""
