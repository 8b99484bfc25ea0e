"""Second moments of what layers read in the dense model.

They are measured once and kept, or, where the disk has no room for them, of a block or some whenever layers are pruned.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook_kernels.statistics import pack_triangle, unpack_triangle
from tools.base.progress import Progress, ignore_progress
from tools.models.mapped import map_tensors
from tools.statistics.collect import collect_moments
from tools.statistics.passage import Walk
from tools.statistics.requests import begin_walk
from tools.workbench.losses import Crew
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.unfinished import Kind, StoredProfile
from tools.workbench.weights import Weights


@dataclass(eq=False)
class Held:
    """A second moment that is not kept: its upper triangle, (U,) fp32, in a file that ends with the process."""

    upper_U: Tensor
    width: int


Found = Mapping[str, str | Held]
"""Second moments by the first layer of each group, where they lie."""


def write_moment(store: ArtifactStore, moment_II: Tensor) -> str:
    """The artifact of a second moment: its upper triangle, (U,) fp32 (`billhook_kernels.statistics`), and its width."""
    whole_II = moment_II.cpu()  # a GPU that a walk fills has no room for both
    return store.write_tensors({"upper": pack_triangle(whole_II), "width": torch.tensor([len(whole_II)])})


def read_moment(store: ArtifactStore, found: str | Held, device: torch.device) -> Tensor:
    """What is held, or what `write_moment` wrote, (I, I), on the device."""
    if isinstance(found, Held):
        return unpack_triangle(found.upper_U.to(device), found.width)
    tensors = store.read_tensors(found)
    return unpack_triangle(tensors["upper"].to(device), int(tensors["width"]))


class SecondMoments:
    """Those of the profiles of one model."""

    def __init__(self, weights: Weights, store: ArtifactStore, index: Index, crew: Crew, at_once: int | None) -> None:
        """They are kept, or, where `at_once` is given, of no more than so many blocks."""
        self._weights, self._store, self._index, self._crew = weights, store, index, crew
        self._at_once = at_once
        self._held: dict[str, dict[str, Held]] = {}
        """By the means of the profile of one text."""

    @property
    def kind(self) -> Kind:
        """Of a profile that is made with them."""
        return "passed" if self._at_once else "full"

    def add_up(self, terms: Sequence[tuple[str | Held, float]], device: torch.device) -> Tensor:
        """The sum of second moments, each by its share; fp32 on the device."""
        (first, share), *others = terms
        total_II = read_moment(self._store, first, device)
        if others:
            total_II = total_II * share
        for found, share in others:
            total_II.add_(read_moment(self._store, found, device), alpha=share)
        return total_II

    def find(self, stored: StoredProfile, progress: Progress = ignore_progress) -> Found:
        """Each second moment; where the profile was made for masks alone, measured in the dense model.

        Of several texts they are those of each text that counts, which is named before the group. Where they are not
        kept these are those of the block that `pass_blocks` has come to.
        """
        if not stored.parts:
            return self._find_of_text(stored, progress)
        return {
            f"{text} {leader}": found
            for text, alone in _list_texts(stored).items()
            for leader, found in self._find_of_text(alone, progress).items()
        }

    def _find_of_text(self, stored: StoredProfile, progress: Progress) -> Found:
        if (kept := self._read_kept(stored)) is not None:
            return kept
        if self._at_once:
            return self._held.get(stored.means, {})
        return self._index.keep_measured(["moments", stored.means], self._measure(stored, progress))

    def _read_kept(self, stored: StoredProfile) -> dict[str, str] | None:
        """Those of a text that lie on disk; None where they were never measured, or not kept."""
        return stored.moments or self._index.read_measured(["moments", stored.means])

    def lacks(self, stored: StoredProfile) -> bool:
        """Whether those of a profile have to be collected block by block."""
        return bool(self._list_lacking(stored))

    def _list_lacking(self, stored: StoredProfile) -> list[StoredProfile]:
        """Its texts whose moments are not kept."""
        if not self._at_once:
            return []
        return [text for text in _list_texts(stored).values() if self._read_kept(text) is None]

    @contextmanager
    def pass_blocks(
        self,
        stored: StoredProfile,
        progress: Progress,
        let_go: Callable[[], None],
        *,
        down: bool = False,
    ) -> Iterator[Callable[[int], None]]:
        """Given the number of a block, one after another, it sees to it that `find` finds the moments of that block.

        Where all are kept they are measured first, if they were not. Else the text passes the dense model, which is put
        in place and has to be whenever a block is asked for, and those of the block are held until the next one; on the
        way `down` to earlier blocks, for each of which the text sets out anew, of as many blocks as there is room for.
        Before others are collected `let_go` is called, for whoever has one in use has all of their file.
        """
        texts = self._list_lacking(stored)
        if not texts:
            self.find(stored, progress)
            yield lambda block: None
            return
        count, held = (self._at_once or 1) if down else 1, range(0)

        def forget() -> None:
            let_go()
            for text in texts:
                self._held.pop(text.means, None)

        def hold(block: int) -> None:
            nonlocal held
            if block not in held:
                forget()
                held = range(max(0, block + 1 - count), block + 1)
                for text, walk in zip(texts, walks, strict=True):
                    self._held[text.means] = self._hold(walk, held)

        self._weights.restore_dense()
        try:
            with ExitStack() as stack:
                team = self._crew.team
                walks = [stack.enter_context(begin_walk(team, x.calibration, shares=x.shares)) for x in texts]
                yield hold
        finally:
            forget()

    def _hold(self, walk: Walk, blocks: range) -> dict[str, Held]:
        widths: dict[str, int] = {}

        def collect() -> Iterator[tuple[str, Tensor]]:
            for block in blocks:
                for leader, moment_II in self._collect(walk, block).items():
                    widths[leader] = len(moment_II)
                    yield leader, pack_triangle(moment_II.cpu())
                del moment_II  # it may be the widest, and sums of the next block are to be made

        mapped = map_tensors(collect(), self._store.directory, what="second moments")
        return {leader: Held(upper_U, widths[leader]) for leader, upper_U in mapped.items()}

    def _collect(self, walk: Walk, block: int) -> dict[str, Tensor]:
        layers = self._weights.by_block[block]
        return collect_moments(self._crew.team, self._crew.extent, walk, block, layers).second_moment

    def _measure(self, stored: StoredProfile, progress: Progress) -> dict[str, str]:
        """All of them, which are kept: the artifact of each."""
        self._weights.restore_dense()
        artifacts: dict[str, str] = {}
        blocks = range(len(self._weights.by_block))
        with begin_walk(self._crew.team, stored.calibration, shares=stored.shares) as walk:
            for block in blocks:
                progress("second moments", block, len(blocks))

                def measure(block: int = block) -> dict[str, str]:
                    found = self._collect(walk, block)
                    return {leader: write_moment(self._store, moment_II) for leader, moment_II in found.items()}

                artifacts |= self._index.measure_files(["moments", stored.means, str(block)], measure)
        progress("second moments", len(blocks), len(blocks))
        return artifacts


def _list_texts(stored: StoredProfile) -> dict[str, StoredProfile]:
    """Each text that counts in a profile as that of one text, by its name; a profile of one text is its own."""
    if not stored.parts:
        return {"": stored}
    return {
        text: stored.model_copy(
            update={"means": part.means, "moments": part.moments, "mix": stored.only(text), "parts": {}}
        )
        for text, part in stored.parts.items()
        if stored.mix[text]
    }
