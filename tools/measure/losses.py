"""Perplexity and paired KL of the model in the workbench on a split of text."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from tools.base.progress import Progress, heed_stop
from tools.base.student import find_p
from tools.models.blocks import Blocks
from tools.models.readout import measure_losses


class Evaluation(BaseModel):
    """Losses per window; every window has as many tokens of text, so plain means are means over tokens."""

    nll: list[float | None] = Field(description="Nats per token of each window; null where it was not finite.")
    kl: list[float | None] = Field(description="KL(dense || model) of each window, nats per token.")

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if len(self.nll) != len(self.kl):
            raise ValueError(f"{len(self.nll)} windows with a loss, but {len(self.kl)} with a KL")
        return self

    @property
    def finite(self) -> bool:
        """Whether every loss is a number."""
        return None not in self.nll and None not in self.kl

    @property
    def perplexity(self) -> float | None:
        """exp of the mean nats per token; None when a window was not finite or the exponential overflows."""
        mean = _mean(self.nll)
        return math.exp(mean) if mean is not None and mean < 700 else None

    @property
    def mean_kl(self) -> float | None:
        """Mean KL in nats per token."""
        return _mean(self.kl)

    @property
    def kl_error(self) -> float | None:
        """Standard error of the mean KL over windows."""
        return _standard_error([k for k in self.kl if k is not None]) if self.finite else None


def compare_kl(trial: Evaluation, accepted: Evaluation) -> tuple[float, float]:
    """(mean, standard error) of the trial's KL minus the accepted one's, paired window by window.

    Raises ValueError when either is not finite or they were measured on different windows.
    """
    if not (trial.finite and accepted.finite) or len(trial.kl) != len(accepted.kl):
        raise ValueError("only finite evaluations of the same windows can be compared")
    pairs = zip(trial.kl, accepted.kl, strict=True)
    differences = [t - a for t, a in pairs if t is not None and a is not None]
    return float(np.mean(differences)), _standard_error(differences)


def find_likelihood_better(trial: Evaluation, accepted: Evaluation) -> float:
    """The probability that the trial's mean KL is the lower one: of the paired t statistic over windows, one-sided.

    Student's distribution, as the posterior of a mean of normal differences under a flat prior. 0.5 where all
    losses are the same. Raises ValueError as `compare_kl`.
    """
    change, error = compare_kl(trial, accepted)
    if not error:
        return 0.5 if change == 0 else float(change < 0)
    tail = find_p(change / error, len(trial.kl) - 1) / 2
    return 1 - tail if change < 0 else tail


def join_windows(first: Evaluation, *more: Evaluation) -> Evaluation:
    """The losses on one text after another."""
    every = (first, *more)
    return Evaluation(nll=[x for part in every for x in part.nll], kl=[x for part in every for x in part.kl])


PREFIX_SHARE = 0.5
"""Of the model's own size: what block inputs that validations start from may take."""


def limit_prefix(model: Any) -> int:
    """Bytes that a loaded model's `PrefixCache` may take."""
    return int(PREFIX_SHARE * sum(parameter.nbytes for parameter in model.parameters()))


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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return float(np.mean(numbers)) if len(numbers) == len(values) and numbers else None


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
