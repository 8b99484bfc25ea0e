"""What is asked about the shards of a calibration text, and who is asked: this process alone, or a team.

Each request is plain data; what its `run` gives is its answer.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from tools.base.settings import Calibration
from tools.models.blocks import Blocks
from tools.models.layers import Layer
from tools.statistics.passage import KeptPassages, Purpose, Walk
from tools.statistics.shards import SHARDS, Span, Sums, join_nodes
from tools.statistics.walks import Nodes, Walks

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Kept(Protocol[T_co]):
    """A value that stands in a request, wherever it lies."""

    def fetch(self) -> T_co:
        """The value itself."""


class Here(NamedTuple, Generic[T]):
    """A value that lies in the request."""

    value: T

    def fetch(self) -> T:
        """As in `Kept`."""
        return self.value


class ShardRequest(Protocol[T_co]):
    """What is asked about a span of shards."""

    def run(self, walks: Walks, span: Span) -> T_co:
        """The answer, by whoever walks through the text."""


class SumMoments(NamedTuple):
    """What a block's layers read (`Walks.moments`)."""

    walk: Walk
    block: int
    full: bool
    purpose: Purpose

    def run(self, walks: Walks, span: Span) -> tuple[Nodes, dict[str, str]]:
        """As in `ShardRequest`."""
        return walks.moments(span, *self)


class SumGradients(NamedTuple):
    """What flows back through a block's layers (`Walks.gradients`)."""

    walk: Walk
    block: int

    def run(self, walks: Walks, span: Span) -> Nodes:
        """As in `ShardRequest`."""
        return walks.gradients(span, *self)


class SumMaskCurves(NamedTuple):
    """The curves of a block's layers, of what the two-sided mask removes (`Walks.mask_curves`)."""

    walk: Walk
    block: int
    known: Mapping[str, Sequence[Tensor]]

    def run(self, walks: Walks, span: Span) -> Nodes:
        """As in `ShardRequest`."""
        return walks.mask_curves(span, *self)


class SumCurves(NamedTuple):
    """The curves of a block's layers for any change (`Walks.curves`)."""

    walk: Walk
    block: int
    parts: "Parts"

    def run(self, walks: Walks, span: Span) -> Nodes:
        """As in `ShardRequest`."""
        parts = {name: part for some in self.parts for name, part in some.fetch().items()}
        return walks.curves(span, self.walk, self.block, parts)


Parts = Sequence[Kept[Mapping[str, Iterable[Tensor]]]]
"""By layer, what each of LEVELS changes beyond the last, (O, I); in as many pieces as it was made in."""


class Finish(NamedTuple):
    """Let go of what a walk holds (`Walks.finish`)."""

    walk: Walk
    whole: bool

    def run(self, walks: Walks, span: Span) -> None:
        """As in `ShardRequest`."""
        walks.finish(self.walk, whole=self.whole)


Answers = Callable[[Callable[[int], None]], list[T]]
"""Waits for the answers of all workers, in the order of their spans; is told of each how many shards it is about."""


class Team(Protocol):
    """Whoever does the work on the shards of a text, each its span of them."""

    @property
    def ahead(self) -> int:
        """Requests that may wait in line while an earlier one's answers are being used."""

    def ask(self, request: ShardRequest[T]) -> Answers[T]:
        """Begin with a request to every worker."""


class Alone:
    """The team of one that is in this process: all shards, at once."""

    ahead = 0

    def __init__(self, walks: Walks, shards: int) -> None:
        self._walks, self._shards = walks, shards

    def ask(self, request: ShardRequest[T]) -> Answers[T]:
        """As in `Team`; the answer is there when this returns."""
        answer = request.run(self._walks, (0, self._shards))

        def collect(tick: Callable[[int], None]) -> list[T]:
            tick(self._shards)
            return [answer]

        return collect


def ask_in_turn(team: Team, requests: Sequence[ShardRequest[T]], tick: Callable[[int], None]) -> Iterator[list[T]]:
    """The answers to one request after another, the next of which the team may begin meanwhile."""
    begun = [team.ask(request) for request in requests[: team.ahead]]
    for i in range(len(requests)):
        begun += [team.ask(request) for request in requests[i + team.ahead : i + team.ahead + 1]]
        yield begun.pop(0)(tick)


def ignore_ticks(shards: int) -> None:
    """For work too small to show progress of."""


_walks = itertools.count()


@contextmanager
def begin_walk(team: Team, text: Calibration = "run", *, shares: Sequence[float] = ()) -> Iterator[Walk]:
    """One more walk through a calibration text, be others under way or not; afterwards nothing of it is held.

    `shares` are as in `Walk`: given wherever the text is several.
    """
    walk, whole = Walk(next(_walks), text, tuple(shares)), False
    try:
        yield walk
        whole = True
    finally:
        team.ask(Finish(walk, whole))(ignore_ticks)


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
    def gradients(self) -> int:
        """Tokens of each text that gradients are taken of."""
        return self.gradient_windows * self.tokens

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
    kept: KeptPassages | None = None,
) -> tuple[Team, Extent]:
    """This process as the team that walks through calibration text; files without a name lie in `scratch`.

    The texts `mixed`, and what is `kept`, are as `Walks` has them. The first `lead` tokens of each window are no text.
    Where the windows are of several `texts`, there are so many gradient windows of each.
    """
    flowing = min(gradient_windows, len(windows_BT) // texts)
    extent = Extent(len(windows_BT), flowing, windows_BT.shape[1] - lead, lead, texts)
    walks = Walks(blocks, layers, windows_BT, extent.gradient_windows, seed, scratch, mixed=mixed, lead=lead, kept=kept)
    return Alone(walks, extent.shards), extent


def join_answers(extent: Extent, answers: Sequence[Nodes]) -> Sums:
    """The sums over the whole text."""
    known: dict[Span, Sums] = {node: sums for nodes in answers for node, sums in nodes}
    return join_nodes((0, extent.shards), known)
