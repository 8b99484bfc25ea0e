"""How much calibration text there is, who walks through it, and the sums over all of it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tools.base.settings import Calibration
from tools.models.blocks import Blocks
from tools.models.layers import Layer
from tools.statistics.passage import KeptPassages, Walk
from tools.statistics.requests import Alone, Finish, Team, ignore_ticks
from tools.statistics.shards import SHARDS, Span, Sums, join_nodes
from tools.statistics.walks import Nodes, Walks

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
