"""Losses of the weights that are in the model, or of several checkpoints beside one another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tools.base.progress import Progress, Warn, count_up
from tools.base.settings import Calibration, Split, TeamSettings
from tools.measure.losses import (
    PrefixCache,
    SoFar,
    StateFiles,
    evaluate_by_blocks,
    evaluate_windows,
    forget_states,
    limit_prefix,
)
from tools.models.blocks import Blocks
from tools.models.streamed import find_stream
from tools.results.losses import Evaluation
from tools.statistics.passage import KeptPassages
from tools.statistics.requests import Extent, Team, work_alone
from tools.team.cluster import Cluster
from tools.team.requests import MeasureLosses, OnSpan
from tools.team.worker import Texts
from tools.texts.windows import Windows
from tools.workbench.weights import Weights


@dataclass
class Crew:
    """Whom the parts of a workbench ask."""

    team: Team
    """Whoever walks through calibration text."""
    extent: Extent
    cluster: Cluster | None = None
    """The workers, where there are some."""

    @property
    def abreast(self) -> int:
        """How many checkpoints are measured at once: one by each worker, or one by this process alone."""
        return self.cluster.size if self.cluster else 1

    def close(self) -> None:
        """Let workers go that were gathered."""
        if self.cluster is not None:
            self.cluster.close()


def gather_crew(
    settings: TeamSettings,
    blocks: Blocks,
    weights: Weights,
    texts: Texts,
    scratch: Path,
    warn: Warn,
    kept: KeptPassages | None = None,
) -> Crew:
    """Workers where the settings ask for them; in the directory `scratch` lie files without a name.

    How far this process' walks have come is `kept`; workers of this machine keep theirs in `scratch`.
    Raises UserError when they cannot be had.
    """
    windows = texts.windows
    calibration = windows.calibration.to(blocks.model.device)
    team, extent = work_alone(
        blocks,
        weights.layers,
        calibration,
        settings.gradient_windows,
        settings.seed,
        scratch,
        windows.mixed,
        windows.lead,
        max(len(windows.texts), 1),
        kept,
    )
    if not settings.workers:
        return Crew(team, extent)
    cluster = Cluster(settings, texts, weights, blocks.model, scratch, warn)
    return Crew(cluster, extent, cluster)


MeasuredText = Split | Literal["calibration"] | Calibration


class Losses:
    """What the model of a workbench loses on its texts."""

    def __init__(
        self,
        blocks: Blocks,
        windows: Windows,
        weights: Weights,
        directory: Path,
        crew: Crew,
        shares: Mapping[str, float],
    ) -> None:
        """`shares` are what each named text counts, and `directory` that of the run."""
        self._directory = directory
        self._blocks, self._streamed = blocks, find_stream(blocks.model) is not None
        self.prefix = PrefixCache(blocks, windows.validation, limit_prefix(blocks.model))
        self._model, self._windows, self._weights, self._crew = blocks.model, windows, weights, crew
        self._shares = dict(shares)

    def count_windows(self, split: MeasuredText) -> int:
        """How many windows a text has."""
        return len(self._windows.find_text(split))

    def list_part(self, split: MeasuredText, windows: int) -> list[int]:
        """Windows that stand for all of a text, as many of each text, so many in all or, for that, a few more; spread
        over it, and those of a smaller part among those of a greater one (`tools.texts.windows.spread_windows`)."""
        return self._windows.list_spread(split, -(-windows // max(len(self._windows.texts), 1)))

    def take_part(self, evaluation: Evaluation, windows: int) -> Evaluation:
        """Of losses on a part of the validation text, or on all of it, those of a smaller part, or of as many."""
        places = self.list_part("validation", len(evaluation.kl))
        return evaluation.take([places.index(window) for window in self.list_part("validation", windows)])

    def _name(self, evaluation: Evaluation, split: MeasuredText, windows: Sequence[int]) -> Evaluation:
        """With the texts that windows are of, and what these count."""
        texts = self._windows.name_each(split, windows)
        return evaluation.model_copy(update={"texts": texts, "weights": self._shares}) if texts else evaluation

    def measure(
        self,
        split: MeasuredText,
        windows: Sequence[int],
        dense_hidden_BTD: Tensor | None,
        label: str,
        progress: Progress,
        *,
        from_change: bool = False,
        so_far: SoFar | None = None,
    ) -> tuple[Evaluation, Tensor]:
        """As `evaluate_windows`, of some windows of a text, by the workers where there are some.

        `from_change`, for the whole validation text alone: from the first block that is other than it was when this
        was measured last. Hidden states come from workers only where none of the dense model's are given. What is known
        `so_far` is not measured again; workers, each of whom answers for all of its windows at once, do not fill it.
        Of a model that is streamed all windows pass block by block, all blocks, and `so_far` stays as it is: what they
        passed on is kept instead, by workers of this machine, too.
        """
        if self._crew.cluster is None:
            text_BT = self._windows.find_text(split)[list(windows)].to(self._model.device)
            lead = self._windows.lead
            if self._streamed:
                kept, marks = None, self._weights.mark_present()
                if marks and not self._blocks.leave_something:
                    kept = StateFiles(self._directory, self._weights.hash_all_dense(), text_BT, marks)
                evaluation, hidden_BTD = evaluate_by_blocks(
                    self._blocks, text_BT, dense_hidden_BTD, label, progress, lead=lead, kept=kept
                )
                forget_states(self._directory)
                return self._name(evaluation, split, windows), hidden_BTD
            prefix = (self.prefix, self._weights.mark_blocks(self._weights.installed)) if from_change else None
            evaluation, hidden_BTD = evaluate_windows(
                self._model, text_BT, dense_hidden_BTD, label, progress, prefix, lead=lead, so_far=so_far
            )
            return self._name(evaluation, split, windows), hidden_BTD
        dense = None if dense_hidden_BTD is None else self._crew.cluster.keep(dense_hidden_BTD)
        request = MeasureLosses(split, list(windows), dense, keeps_hidden=dense is None, keeps_states=True)
        answers = self._crew.cluster.share(request, len(windows))(count_up(progress, label, len(windows)))
        forget_states(self._directory)
        evaluation = Evaluation(
            nll=[value for answer in answers for value in answer.nll],
            kl=[value for answer in answers for value in answer.kl],
        )
        hidden = [answer.hidden_BTD for answer in answers if answer.hidden_BTD is not None]
        return self._name(evaluation, split, windows), torch.cat(hidden) if hidden else torch.empty(0)

    def measure_other(self, model: Any, dense_hidden_BTD: Tensor, label: str, progress: Progress) -> Evaluation:
        """Losses on the validation text of another model of the same tokens."""
        windows_BT = self._windows.validation.to(self._model.device)
        lead = self._windows.lead
        evaluation, _ = evaluate_windows(model, windows_BT, dense_hidden_BTD, label, progress, lead=lead)
        return self._name(evaluation, "validation", range(len(windows_BT)))

    def hand_out(
        self,
        cluster: Cluster,
        split: MeasuredText,
        weights: Mapping[str, Mapping[str, str]],
        windows: Sequence[int],
        dense_hidden_BTD: Tensor,
        label: str,
        progress: Progress,
    ) -> Iterator[tuple[str, Evaluation]]:
        """Each checkpoint with its losses on some windows of a text, whichever worker is done first.

        `weights` are, for each checkpoint, the artifacts of its layers. They are handed to the workers whole, and none
        come into this process' model. Raises DamagedArtifact.
        """
        tick = count_up(progress, label, len(weights) * len(windows))
        request = MeasureLosses(split, list(windows), cluster.keep(dense_hidden_BTD), keeps_hidden=False)
        jobs, names = [OnSpan(request, (0, len(windows)))] * len(weights), list(weights)
        for number, answer in cluster.hand_out(jobs, list(weights.values())):
            tick(len(windows))
            yield names[number], self._name(Evaluation(nll=answer.nll, kl=answer.kl), split, windows)
