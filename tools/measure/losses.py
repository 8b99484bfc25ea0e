"""Perplexity and paired KL of the model in the workbench on a split of text."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from tools.base.progress import Progress, heed_stop
from tools.base.student import find_p
from tools.models.blocks import Blocks
from tools.models.readout import measure_losses, sum_losses
from tools.models.streamed import find_stream

MOST_NATS = 700.0
"""Below this the exponential is a number."""


class Evaluation(BaseModel):
    """Losses per window; every window has as many tokens of text, so plain means are means over tokens.

    Where texts have names, all figures are means of those of each text by its weight.
    """

    nll: list[float | None] = Field(description="Nats per token of each window; null where it was not finite.")
    kl: list[float | None] = Field(description="KL(dense || model) of each window, nats per token.")
    texts: list[str] = Field(
        [], exclude_if=operator.not_, description="The text of each window, where texts are named."
    )
    weights: dict[str, float] = Field(
        {}, exclude_if=operator.not_, description="What each of them counts beside the others."
    )

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if len(self.nll) != len(self.kl):
            raise ValueError(f"{len(self.nll)} windows with a loss, but {len(self.kl)} with a KL")
        if self.texts and len(self.texts) != len(self.kl):
            raise ValueError(f"{len(self.texts)} windows with a text, but {len(self.kl)} with a KL")
        return self

    @property
    def finite(self) -> bool:
        """Whether every loss is a number."""
        return None not in self.nll and None not in self.kl

    @property
    def perplexity(self) -> float | None:
        """exp of the mean nats per token; None when a window was not finite or the exponential overflows."""
        mean = self._mean(self.nll)
        return math.exp(mean) if mean is not None and mean < MOST_NATS else None

    @property
    def mean_kl(self) -> float | None:
        """Mean KL in nats per token."""
        return self._mean(self.kl)

    @property
    def kl_error(self) -> float | None:
        """Standard error of the mean KL over windows."""
        return self.find_error([k for k in self.kl if k is not None]) if self.finite else None

    def weigh(self, weights: Mapping[str, float]) -> Self:
        """The same losses with what each text counts; those that are not named count nothing."""
        return self.model_copy(update={"weights": {name: weights.get(name, 0.0) for name in self.weights}})

    def take(self, windows: Sequence[int]) -> Self:
        """The losses of some of the windows, by their places."""
        parts = {name: [values[i] for i in windows] for name, values in self._columns().items()}
        return self.model_copy(update=parts)

    def take_text(self, text: str) -> Self:
        """The losses on one of the texts, for themselves."""
        chosen = self.take([i for i, name in enumerate(self.texts) if name == text])
        return chosen.model_copy(update={"texts": [], "weights": {}})

    def _columns(self) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"nll": self.nll, "kl": self.kl}
        return columns | ({"texts": self.texts} if self.texts else {})

    def group(self, values: Sequence[float]) -> list[tuple[float, list[float]]]:
        """(share, values) of the windows of every text that counts, in sum 1; all of them as one where none has a name.

        Where none counts that has windows here, all that have count alike.
        """
        if not self.texts:
            return [(1.0, list(values))]
        grouped: dict[str, list[float]] = {}
        for name, value in zip(self.texts, values, strict=True):
            grouped.setdefault(name, []).append(value)
        weights = {name: self.weights.get(name, 0.0) for name in grouped}
        total = sum(weights.values())
        return [(weights[name] / total, own) for name, own in grouped.items() if weights[name]] if total else []

    def find_mean(self, values: Sequence[float]) -> float:
        """The mean of a figure of each window, every text by its weight; nan where no text here counts."""
        groups = self.group(values)
        return sum(share * float(np.mean(own)) for share, own in groups) if groups else math.nan

    def find_error(self, values: Sequence[float]) -> float:
        """Standard error of `find_mean` over windows."""
        return _join_errors([(share, _standard_error(own)) for share, own in self.group(values)])

    def _mean(self, values: Sequence[float | None]) -> float | None:
        numbers = [v for v in values if v is not None]
        return self.find_mean(numbers) if len(numbers) == len(values) and numbers else None


def _join_errors(errors: Sequence[tuple[float, float]]) -> float:
    """The standard error of a sum of independent parts, (share, standard error) each."""
    if len(errors) == 1 and errors[0][0] == 1:
        return errors[0][1]
    return math.hypot(*(share * error for share, error in errors))


def compare_kl(trial: Evaluation, accepted: Evaluation) -> tuple[float, float]:
    """(mean, standard error) of the trial's KL minus the accepted one's, paired window by window.

    Raises ValueError when either is not finite or they were measured on different windows.
    """
    differences = _pair_kl(trial, accepted)
    return trial.find_mean(differences), trial.find_error(differences)


def _pair_kl(trial: Evaluation, accepted: Evaluation) -> list[float]:
    if not (trial.finite and accepted.finite) or len(trial.kl) != len(accepted.kl) or trial.texts != accepted.texts:
        raise ValueError("only finite evaluations of the same windows can be compared")
    pairs = zip(trial.kl, accepted.kl, strict=True)
    return [t - a for t, a in pairs if t is not None and a is not None]


def find_likelihood_better(trial: Evaluation, accepted: Evaluation) -> float:
    """The probability that the trial's mean KL is the lower one: of the paired t statistic over windows, one-sided.

    Student's distribution, as the posterior of a mean of normal differences under a flat prior; of a sum over several
    texts with the degrees of freedom of Welch and Satterthwaite, rounded down. 0.5 where all losses are the same.
    Raises ValueError as `compare_kl`.
    """
    change, error = compare_kl(trial, accepted)
    if not error:
        return 0.5 if change == 0 else float(change < 0)
    tail = find_p(change / error, _count_degrees(trial, accepted)) / 2
    return 1 - tail if change < 0 else tail


def _count_degrees(trial: Evaluation, accepted: Evaluation) -> int:
    groups = trial.group(_pair_kl(trial, accepted))
    if len(groups) == 1:
        return len(groups[0][1]) - 1
    variances = [((share * _standard_error(own)) ** 2, len(own) - 1) for share, own in groups]
    spread = sum(variance**2 / degrees for variance, degrees in variances if degrees)
    return max(1, math.floor(sum(variance for variance, _ in variances) ** 2 / spread + 1e-9)) if spread else 1


def join_windows(first: Evaluation, *more: Evaluation) -> Evaluation:
    """The losses on one text after another, weighed as the first."""
    every = (first, *more)
    return Evaluation(
        nll=[x for part in every for x in part.nll],
        kl=[x for part in every for x in part.kl],
        texts=[x for part in every for x in part.texts],
        weights=first.weights,
    )


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

    def read(self) -> tuple[int, list[Tensor]] | None:
        """(the next block, what it reads of each window, (1, T, D) on CPU); None where nothing is kept."""

    def keep(self, block: int, states: Sequence[Tensor]) -> None:
        """All windows stand before this block."""


@torch.no_grad()
def pass_blocks(
    blocks: Blocks,
    windows_BT: Tensor,
    tick: Callable[[int], object] = lambda block: None,
    kept: KeptStates | None = None,
) -> list[Tensor]:
    """What the head reads of each window, (1, T, D), on CPU: all windows pass a block before any passes the next.

    `tick` is called with the number of each block before.
    """
    first, states = (kept.read() if kept else None) or (0, [blocks.embed(ids_T).cpu() for ids_T in windows_BT])
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

    Between two blocks all windows' states are held, on CPU; those that are `kept` need not be made.
    """
    count, length = len(windows_BT), windows_BT.shape[1] - lead
    states = pass_blocks(blocks, windows_BT, lambda block: progress(label, block * count // len(blocks), count), kept)
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
    return evaluation, torch.cat(states)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
