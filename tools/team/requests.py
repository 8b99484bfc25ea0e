"""What is asked of a worker: plain data, whose `run` gives the answer.

Tensors in them may lie elsewhere (`Kept`), so that several requests share one.
"""

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from tools.base.settings import Calibration, Split
from tools.plans.recipe import Recipe
from tools.statistics.requests import Kept, ShardRequest
from tools.statistics.shards import Span
from tools.statistics.walks import Nodes
from tools.team.worker import LayerGroup, LayerResult, StoredLayer, WindowLosses, Worker

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Job(Protocol[T_co]):
    """What one worker does."""

    def run(self, worker: Worker) -> T_co:
        """The answer."""


class Shared(Protocol[T_co]):
    """What several workers do, each a span of the items that it is about."""

    def run(self, worker: Worker, span: Span) -> T_co:
        """The answer of one of them."""


class OnSpan(NamedTuple, Generic[T]):
    """One worker's part of what is shared."""

    request: Shared[T]
    span: Span

    def run(self, worker: Worker) -> T:
        """As in `Job`."""
        return self.request.run(worker, self.span)


class OnShards(NamedTuple, Generic[T]):
    """What is asked about shards of a calibration text."""

    request: ShardRequest[T]

    def run(self, worker: Worker, span: Span) -> T:
        """As in `Shared`, of shards."""
        return self.request.run(worker.walks, span)


class MeasureLosses(NamedTuple):
    """Losses on some windows of a text."""

    split: str
    windows: Sequence[int]
    dense_hidden_BTD: Kept[Tensor] | None
    """The dense model's hidden states of all of `windows`."""
    keeps_hidden: bool
    keeps_states: bool = False

    def run(self, worker: Worker, span: Span) -> WindowLosses:
        """As in `Shared`, of windows."""
        part, keeps = slice(*span), {"keeps_hidden": self.keeps_hidden, "keeps_states": self.keeps_states}
        hidden_BTD = None if self.dense_hidden_BTD is None else self.dense_hidden_BTD.fetch()[part]
        return worker.losses(self.split, self.windows[part], hidden_BTD, **keeps)


class OfPolish(NamedTuple):
    """What a polish asks about: windows of its calibration text, and the layers that it changes."""

    layers: Sequence[str]
    windows: Sequence[int]
    dense_hidden: Sequence[Kept[Tensor]]
    """What the dense model's head reads of each of them, (T, D)."""
    text: Calibration
    shares: Sequence[float] = ()
    """What each of them counts, as `Divergence` has it; none where all count alike."""


class SumDivergence(NamedTuple):
    """KL(dense || model) on the windows, and its gradients by survivors (`Divergence.sum_nodes`)."""

    about: OfPolish

    def run(self, worker: Worker, span: Span) -> Nodes:
        """As in `Shared`, of windows."""
        return worker.diverge(*self.about, span).sum_nodes(self.about.windows, span)


class MeasureDivergence(NamedTuple):
    """KL(dense || model) of each of the windows."""

    about: OfPolish

    def run(self, worker: Worker, span: Span) -> list[float]:
        """As in `Shared`, of windows."""
        problem = worker.diverge(*self.about, span)
        return [problem.measure_window(window) for window in self.about.windows[slice(*span)]]


class ReadAnswers(NamedTuple):
    """What the model makes of the answers to a split's questions."""

    split: Split

    def run(self, worker: Worker, span: Span) -> list[float]:
        """As in `Shared`, of batches of questions."""
        return worker.read_answers(self.split, span)


class PruneLayers(NamedTuple):
    """Prune layers from their dense weights."""

    recipe: Recipe
    group: LayerGroup

    def run(self, worker: Worker) -> list[LayerResult]:
        """As in `Job`."""
        return worker.prune(self.recipe, self.group)


class PruneToLevels(NamedTuple):
    """What pruning layers to each of LEVELS changes beyond the last."""

    recipe: Recipe
    group: LayerGroup

    def run(self, worker: Worker) -> dict[str, list[Tensor]]:
        """As in `Job`; by layer."""
        return worker.prune_to_levels(self.recipe, self.group)


class Install(NamedTuple):
    """Put weights into the worker's model."""

    name: str
    """Of all weights of the model, once these are in it."""
    weights: Mapping[str, Kept[StoredLayer]]
    marks: Sequence[str]
    """For each block, a name of the weights of all blocks before it."""

    def run(self, worker: Worker) -> None:
        """As in `Job`."""
        worker.install(self.name, self.weights, self.marks)
