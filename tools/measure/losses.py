"""Perplexity and paired KL of the model in the workbench on a split of text."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tools.base.progress import Progress, heed_stop
from tools.models.blocks import Blocks
from tools.models.readout import measure_losses, sum_losses
from tools.models.streamed import find_stream
from tools.models.unfinished import UNFINISHED, KeptFiles, Marks, forget_all, hold_states, stack_states
from tools.results.losses import Evaluation

_PREFIX = "pass-"


class StateFiles:
    """As `tools.measure.losses.KeptStates`: at most so old as `KEEP_SECONDS`, or as the last block."""

    def __init__(self, run: Path, dense: str, windows_BT: Tensor, marks: Marks) -> None:
        """In the directory of a run. `dense` names the dense model, and `marks` the weights that windows pass."""
        windows = hashlib.sha256(windows_BT.cpu().numpy().tobytes()).hexdigest()
        name = hashlib.sha256(f"{dense} {windows}".encode()).hexdigest()[:16]
        self._files, self._marks = KeptFiles(run / UNFINISHED / f"{_PREFIX}{name}"), marks

    def read(self) -> tuple[int, Mapping[int, Tensor]] | None:
        """As in `KeptStates`; None too where they are of other weights, or a file is gone or damaged."""
        found = self._files.read()
        if found is None or self._marks.below[found[0]["block"]] != found[0]["mark"]:
            return None
        states_BTD = found[1]["states"]
        return found[0]["block"], dict(enumerate(states_BTD.split(1)))

    def keep(self, block: int, states: Mapping[int, Tensor]) -> None:
        """As in `KeptStates`. Raises DiskFull."""
        if block < len(self._marks.below) and self._files.are_due:
            self._files.replace({"states": stack_states(states)}, block=block, mark=self._marks.below[block])


def forget_states(run: Path) -> None:
    """All is done, and kept elsewhere, by whatever processes."""
    forget_all(run, _PREFIX)


PREFIX_SHARE = 0.5
"""Of the model's own size: what block inputs that validations start from may take."""


def limit_prefix(model: Any) -> int:
    """Bytes that a loaded model's `PrefixCache` may take; none of one that is streamed (`evaluate_by_blocks`)."""
    return 0 if find_stream(model) else int(PREFIX_SHARE * sum(parameter.nbytes for parameter in model.parameters()))


class PrefixCache:
    """Block inputs of the last evaluation, so that the next one starts at the first block whose weights differ.

    Kept in CPU memory for every n-th block, as many as `limit` bytes hold. Results are the same bits as without.
    """

    def __init__(self, blocks: Blocks, windows_BT: Tensor, limit: int) -> None:
        hidden = blocks.model.get_input_embeddings().weight
        size = windows_BT.numel() * hidden.shape[1] * hidden.element_size()
        step = math.ceil(len(blocks) * size / max(limit, 1))
        self.blocks = blocks
        self.kept = range(step, len(blocks), step)
        self._inputs: dict[int, list[Tensor]] = {}
        self._marks: dict[int, str] = {}

    def find_start(self, marks: Sequence[str]) -> int:
        """The last kept block below which nothing changed; `marks[b]` names the weights of all blocks before b."""
        return max((block for block, mark in self._marks.items() if mark == marks[block]), default=0)

    @contextmanager
    def replay(self, ids_T: Tensor, first: int, window: int) -> Iterator[None]:
        """Inside, a forward on one window starts at block `first`; what it passes on is kept."""
        given = self._inputs[first][window] if first else None
        with self.blocks.only(first, len(self.blocks), ids_T, given) as boundary:
            yield
        for block in self.kept:
            if block > first:
                self._inputs.setdefault(block, [])[window:] = [boundary[block].cpu()]

    def forget_from(self, first: int) -> None:
        """What is kept of blocks after `first` is about to be replaced."""
        self._marks = {block: mark for block, mark in self._marks.items() if block <= first}

    def remember(self, marks: Sequence[str]) -> None:
        """All windows were replayed with the weights named by `marks`."""
        self._marks = {block: marks[block] for block in self.kept}


@dataclass
class SoFar:
    """What is known of the first windows of a text, and grows window by window: interrupted, it goes on from there."""

    nll: list[float | None] = field(default_factory=list)
    kl: list[float | None] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    """Hidden states (T, D) on the CPU, of none or of all of them."""


def evaluate_windows(
    model: Any,
    windows_BT: Tensor,
    dense_hidden_BTD: Tensor | None,
    label: str,
    progress: Progress,
    prefix: tuple[PrefixCache, Sequence[str]] | None = None,
    *,
    lead: int = 0,
    so_far: SoFar | None = None,
) -> tuple[Evaluation, Tensor]:
    """Losses of every window, and the hidden states (B, T, D) in the model's dtype, on CPU.

    `prefix` is the cache of these windows' block inputs, with its marks of the weights in the model now; it is of no
    use where windows are known `so_far`, and not touched. The first `lead` tokens of each window are no text, and count
    in no loss.
    """
    so_far = so_far or SoFar()
    count, length = len(windows_BT), windows_BT.shape[1] - lead
    prefix, first = None if so_far.nll else prefix, 0
    if prefix:
        first = prefix[0].find_start(prefix[1])
        prefix[0].forget_from(first)
    for i in range(len(so_far.nll), count):
        ids_T = windows_BT[i]
        heed_stop()
        progress(label, i, count)
        reference = None if dense_hidden_BTD is None else dense_hidden_BTD[i]
        with prefix[0].replay(ids_T, first, i) if prefix else nullcontext():
            losses, hidden_TD = measure_losses(model, ids_T, reference, lead=lead)
        so_far.nll.append(_finite(losses.nll / (length - 1)))
        so_far.kl.append(_finite(losses.kl / length))
        so_far.hidden.append(hidden_TD.cpu())
    if prefix:
        prefix[0].remember(prefix[1])
    progress(label, count, count)
    whole = len(so_far.hidden) == count
    return Evaluation(nll=so_far.nll, kl=so_far.kl), torch.stack(so_far.hidden) if whole else torch.empty(0)


class KeptStates(Protocol):
    """Whoever keeps what windows passed on, so that a pass that was killed goes on from there."""

    def read(self) -> tuple[int, Mapping[int, Tensor]] | None:
        """(the next block, what it reads of each window, (1, T, D) on CPU); None where nothing is kept."""

    def keep(self, block: int, states: Mapping[int, Tensor]) -> None:
        """All windows stand before this block, which reads these, (1, T, D) each."""


@torch.no_grad()
def pass_blocks(
    blocks: Blocks,
    windows_BT: Tensor,
    tick: Callable[[int], object] = lambda block: None,
    kept: KeptStates | None = None,
) -> Mapping[int, Tensor]:
    """What the head reads of each window, (1, T, D), on CPU: all windows pass a block before any passes the next.

    `tick` is called with the number of each block before. Raises DiskFull as `hold_states`.
    """
    first, given = (kept.read() if kept else None) or (0, {})
    begin = given.__getitem__ if given else lambda window: blocks.embed(windows_BT[window])
    states = hold_states(blocks.model, range(len(windows_BT)), begin)
    for block in range(first, len(blocks)):
        tick(block)
        for window, ids_T in enumerate(windows_BT):
            heed_stop()
            states[window] = blocks.run_to_head(ids_T, block, states[window]).cpu()
        if kept:
            kept.keep(block + 1, states)
    return states


@torch.no_grad()
def evaluate_by_blocks(
    blocks: Blocks,
    windows_BT: Tensor,
    dense_hidden_BTD: Tensor | None,
    label: str,
    progress: Progress,
    *,
    lead: int = 0,
    kept: KeptStates | None = None,
) -> tuple[Evaluation, Tensor]:
    """As `evaluate_windows`: all windows pass a block before any passes the next, so that weights are read once.

    Hidden states are those of the dense model alone, which has no others beside it. States between two blocks are as in
    `pass_blocks`; those that are `kept` need not be made.
    """
    count, length = len(windows_BT), windows_BT.shape[1] - lead

    def tick(block: int) -> None:
        progress(label, block * count // len(blocks), count)

    states = pass_blocks(blocks, windows_BT, tick, kept)
    losses = []
    for window, ids_T in enumerate(windows_BT):
        heed_stop()
        reference = None if dense_hidden_BTD is None else dense_hidden_BTD[window]
        hidden_TD = states[window][0].to(windows_BT.device)
        losses.append(sum_losses(blocks.model, ids_T, hidden_TD, reference, lead=lead))
    progress(label, count, count)
    evaluation = Evaluation(
        nll=[_finite(loss.nll / (length - 1)) for loss in losses], kl=[_finite(loss.kl / length) for loss in losses]
    )
    return evaluation, stack_states(states) if dense_hidden_BTD is None else torch.empty(0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
