"""One worker of a team: a model of its own, the run's texts, and the work that is shared out, as plain methods.

Knows no Ray: whoever asks (`tools.team.requests`) sees to it that what goes in and comes out is on the CPU.

Shape suffixes: B windows, T tokens, D hidden width, I input features, O output features.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

import billhook_kernels
import tools
from billhook_kernels.methods import LayerStatistics
from tools.base.errors import explain_layer
from tools.base.progress import ignore_progress
from tools.base.settings import Calibration, Split, WorkbenchSettings
from tools.measure.losses import PrefixCache, StateFiles, evaluate_by_blocks, evaluate_windows
from tools.measure.recall import EncodedPair, cut_batches, read_answers
from tools.models.artifacts import pack_pruned, unpack_pruned
from tools.models.blocks import Blocks
from tools.models.layers import Biases, find_layers
from tools.models.linear import keep_linear
from tools.models.mapped import view_bytes
from tools.models.streamed import find_stream
from tools.models.unfinished import Marks
from tools.plans.recipe import Recipe
from tools.polish.gradients import Divergence, Survivors
from tools.statistics.kept_passages import PassageFiles
from tools.statistics.requests import Kept
from tools.statistics.shards import Span
from tools.statistics.table import cut_to_levels, prune_layer
from tools.statistics.walks import Walks
from tools.texts.windows import Windows

# Wherever they lie: in a checkout, or each by itself among installed packages.
CODE = (Path(billhook_kernels.__file__).parent, Path(tools.__file__).parent)


class Identity(BaseModel):
    """What must be the same everywhere for results to be the same bits, as far as the device gives them twice."""

    billhook: str
    torch: str
    device: str
    model: str

    def explain_difference(self, other: "Identity") -> str:
        """What the other one has instead, in a few words; "" where it has all the same."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in type(self).model_fields)
        return ", ".join(f"{name} {theirs} instead of {ours}" for name, ours, theirs in pairs if ours != theirs)


def hash_weights(model: Any, but: Container[str] = ()) -> str:
    """SHA-256, in hex, of all weights as they are now but some by name, with names, shapes and dtypes."""
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name in but:
            continue
        if stream := find_stream(model):
            stream.let_go()
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        weights.update(view_bytes(value))
    return weights.hexdigest()


def identify(model: Any) -> Identity:
    """This process: versions, with hashes of Billhook's own code and of the model's weights as they are now."""
    return Identity(
        billhook=f"{importlib.metadata.version('billhook')} ({hash_code(*CODE)[:12]})",
        torch=f"{torch.__version__} on {platform.machine()}",
        device=torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        model=f"with weights {hash_weights(model)[:12]}",
    )


def hash_code(*packages: Path) -> str:
    """SHA-256, in hex, of all code that makes results: every file of Python in these folders, with its place."""
    code = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            content = path.read_bytes()
            code.update(f"{path.relative_to(package.parent).as_posix()} {len(content)}\n".encode())
            code.update(content)
    return code.hexdigest()


class Texts(NamedTuple):
    """Tokens of all that is measured on."""

    windows: Windows
    questions: dict[Split, list[EncodedPair]]


class LayerWork(NamedTuple):
    """A layer to prune: its dense weights, and what is known of it."""

    name: str
    zeros: int
    dense_OI: Kept[Tensor]
    mean_square_I: Tensor
    gradient_square_O: Tensor


class LayerGroup(NamedTuple):
    """Layers to prune that read the same inputs."""

    layers: Sequence[LayerWork]
    moment_II: Tensor | None
    """The second moment of these inputs, where pruning needs it."""


class LayerResult(NamedTuple):
    """A pruned layer: the tensors of its artifact, and the damping that it took."""

    name: str
    tensors: dict[str, Tensor]
    damping: float


class StoredLayer(NamedTuple):
    """A layer's weights as an artifact has them, which may be nothing, and its dense weights where it needs them."""

    tensors: dict[str, Tensor]
    dense_OI: Kept[Tensor] | None


class WindowLosses(NamedTuple):
    """Losses of some windows, as `Evaluation` has them."""

    nll: list[float | None]
    kl: list[float | None]
    hidden_BTD: Tensor | None


class KeptPlace(NamedTuple):
    """Where walks of a model that is streamed are kept."""

    directory: Path
    dense: str
    """What names the dense model."""


MIXED = "neither the old ones nor the new"
"""The name of weights of which some could not be put in."""


class Worker:
    """Owns one loaded model, which it is told to change layer by layer."""

    def __init__(
        self,
        model: Any,
        settings: WorkbenchSettings,
        texts: Texts,
        scratch: Path,
        prefix_bytes: int,
        keeps: KeptPlace | None = None,
    ) -> None:
        """`prefix_bytes` may be kept of what blocks read of the whole validation text; in `scratch` lie files without a
        name. How far walks have come is kept where it `keeps` it."""
        self.model, self.texts, self.device, self._keeps = model, texts, model.device, keeps
        self.blocks, self._streamed = Blocks(model), find_stream(model) is not None
        calibration, mixed, self._lead = texts.windows.calibration, texts.windows.mixed, texts.windows.lead
        layers, _ = keep_linear(self.blocks, find_layers(model), calibration[0].to(self.device))
        if self.blocks.leave_something:
            self._keeps = keeps = None
        self.layers, self._biases = {layer.name: layer for layer in layers}, Biases()
        self.walks = Walks(
            self.blocks,
            layers,
            calibration.to(self.device),
            min(settings.gradient_windows, len(calibration)),
            settings.seed,
            scratch,
            ahead=1,
            mixed=mixed,
            lead=self._lead,
            kept=PassageFiles(keeps.directory, lambda: keeps.dense, self._mark_present) if keeps else None,
        )
        self.weights = ""
        """The name of those in the model, given by whoever sent them; "" as they were loaded."""
        self._marks = [""] * len(self.blocks)
        self._prefix: dict[tuple[int, ...], PrefixCache] = {}
        self._prefix_bytes = prefix_bytes

    def install(self, name: str, weights: Mapping[str, Kept[StoredLayer]], marks: Sequence[str]) -> None:
        """Put weights into layers; `marks[b]` then names the weights of all blocks before b, and `name` all of them."""
        self.weights = MIXED
        for layer_name, kept in weights.items():
            layer, stored = self.layers[layer_name], kept.fetch()
            dense_OI = layer.weight_OI if stored.dense_OI is None else stored.dense_OI.fetch()
            layer.write(unpack_pruned(stored.tensors, dense_OI, layer.device))
            self._biases.write(layer, stored.tensors.get("bias"))
        self._marks, self.weights = list(marks), name

    def _mark_present(self) -> Marks | None:
        return None if self.weights == MIXED else Marks(self._marks, self.weights)

    def losses(
        self,
        split: str,
        windows: Sequence[int],
        dense_hidden_BTD: Tensor | None,
        *,
        keeps_hidden: bool,
        keeps_states: bool = False,
    ) -> WindowLosses:
        """As `evaluate_windows`, of some windows of a text; with the dense model's hidden states of these.

        Of a model that is streamed all of them pass block by block, and its weights are read once; how far they have
        come is kept where that is wanted, until whoever asked forgets it.
        """
        chosen = tuple(windows)
        text_BT = self.texts.windows.find_text(split)[list(chosen)].to(self.device)
        if self._streamed:
            kept, marks = None, self._mark_present()
            if keeps_states and self._keeps and marks:
                kept = StateFiles(self._keeps.directory, self._keeps.dense, text_BT, marks)
            evaluation, hidden_BTD = evaluate_by_blocks(
                self.blocks, text_BT, dense_hidden_BTD, "", ignore_progress, lead=self._lead, kept=kept
            )
        else:
            prefix = (self._find_prefix(chosen, text_BT), self._marks) if split == "validation" else None
            evaluation, hidden_BTD = evaluate_windows(
                self.model, text_BT, dense_hidden_BTD, "", ignore_progress, prefix, lead=self._lead
            )
        return WindowLosses(evaluation.nll, evaluation.kl, hidden_BTD if keeps_hidden else None)

    def _find_prefix(self, chosen: tuple[int, ...], text_BT: Tensor) -> PrefixCache:
        """The cache of these windows of the validation text; it takes the place of one of other windows."""
        if chosen not in self._prefix:
            limit = self._prefix_bytes * len(chosen) // len(self.texts.windows.validation)
            self._prefix = {chosen: PrefixCache(self.blocks, text_BT, limit)}
        return self._prefix[chosen]

    def read_answers(self, split: Split, span: Span) -> list[float]:
        """Log-probabilities of the answers in the span's batches of a split's questions, batch after batch."""
        pairs = self.texts.questions[split]
        batches = cut_batches(pairs)[slice(*span)]
        return [value for batch in batches for value in read_answers(self.model, [pairs[i] for i in batch])]

    def diverge(
        self,
        layers: Sequence[str],
        windows: Sequence[int],
        dense_hidden: Sequence[Kept[Tensor]],
        text: Calibration,
        shares: Sequence[float],
        span: Span,
    ) -> Divergence:
        """KL(dense || model) on a span of some windows of a calibration text, by the survivors of some layers; with
        what each window counts, or no `shares`."""
        known = {windows[place]: dense_hidden[place].fetch() for place in range(*span)}
        survivors = Survivors([self.layers[name] for name in layers])
        known_shares = dict(zip(windows, shares, strict=True)) if shares else None
        windows_BT = self.texts.windows.find_text(text)
        return Divergence(self.blocks, survivors, windows_BT, known, self._lead, known_shares)

    def prune(self, recipe: Recipe, group: LayerGroup) -> list[LayerResult]:
        """Prune layers from their dense weights."""
        results = []
        for layer, dense_OI, statistics in self._with_statistics(group):
            with explain_layer(f"pruning layer {layer.name}"):
                pruned = prune_layer(recipe, dense_OI, statistics, layer.zeros)
                tensors = pack_pruned(pruned.weight_OI, values=recipe.changes_survivors)
            results.append(LayerResult(layer.name, tensors, pruned.damping))
        return results

    def prune_to_levels(self, recipe: Recipe, group: LayerGroup) -> dict[str, list[Tensor]]:
        """What `cut_to_levels` gives of each layer, on the CPU."""
        parts = {}
        for layer, dense_OI, statistics in self._with_statistics(group):
            with explain_layer(f"KL curve of layer {layer.name}"):
                parts[layer.name] = [part_OI.cpu() for part_OI in cut_to_levels(recipe, dense_OI, statistics)]
        return parts

    def _with_statistics(self, group: LayerGroup) -> Iterator[tuple[LayerWork, Tensor, LayerStatistics]]:
        """Each layer with its dense weights and its statistics, on this worker's device."""
        moment_II = None if group.moment_II is None else group.moment_II.to(self.device)
        statistics: LayerStatistics | None = None
        for layer in group.layers:
            gamma_O = layer.gradient_square_O.to(self.device)
            if statistics is None or moment_II is None:
                statistics = LayerStatistics(layer.mean_square_I.to(self.device), gamma_O, moment_II)
            else:
                statistics = statistics.for_outputs(gamma_O)
            yield layer, layer.dense_OI.fetch().to(self.device), statistics
