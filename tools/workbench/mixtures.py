"""Profiles of several texts: what each says by itself, collected once and kept, and sums of that."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from tools.base.progress import Progress
from tools.base.settings import RUN, Calibration, WorkbenchSettings
from tools.results.losses import Evaluation
from tools.statistics.collect import collect_texts
from tools.statistics.known import ModelStatistics, know_read, mix_statistics, refuse_infinite
from tools.statistics.table import build_profile
from tools.statistics.text_curves import measure_text_curves
from tools.texts.windows import Windows
from tools.workbench.losses import Crew
from tools.workbench.moments import write_moment
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.unfinished import (
    Kind,
    StoredProfile,
    TextPart,
    UnfinishedWalk,
    find_unfinished,
    has_parts,
    keep_part,
    name_statistics,
    read_part,
    write_means,
)
from tools.workbench.weights import Weights

Parts = Mapping[str, TextPart]
"""By the name of their text, in the order of the settings."""


class Mixtures:
    """What is known of the layers of one model by several texts."""

    def __init__(
        self,
        settings: WorkbenchSettings,
        windows: Windows,
        weights: Weights,
        store: ArtifactStore,
        index: Index,
        crew: Crew,
    ) -> None:
        self._settings, self._windows, self._weights, self._store = settings, windows, weights, store
        self._index, self._crew = index, crew
        self._shares = list(settings.text_shares.values())

    def make(self, hidden: str, evaluation: Evaluation, progress: Progress, kind: Kind) -> str:
        """A profile of the dense model, which is in place, on all texts.

        What is known of each text does not hang on what it counts: where the weights alone are other than in an earlier
        profile, KL curves alone are measured anew; where texts came to those of one, what layers read of the others.
        """
        mix = self._settings.text_shares
        key = ["texts, leant once", *name_statistics(self._weights, self._settings, "text_weights"), kind]
        known = self._index.read_measured(key)
        if known is None or not has_parts(self._store, known["parts"]):
            found, parts = self._collect_parts(progress, kind)
            kept = {name: part.model_dump() for name, part in parts.items()}
            self._index.replace_measured(key, {"parts": kept, "mix": mix})
            for name in parts:
                self._index.replace_measured(self._name_text(name, kind), {"parts": {name: kept[name]}})
        else:
            parts = {name: TextPart.model_validate(known["parts"][name]) for name in mix}  # what is kept is sorted
            found = self._read(parts)
            if known["mix"] != mix:
                found, parts = self._measure_curves(found, parts, progress)
        return self._write(parts, found, mix, hidden, evaluation, RUN)

    def find(self, run: StoredProfile, profile: str, weights: Mapping[str, float]) -> str:
        """The profile that is another mixture of the texts of `run`, whose id is `profile`; nothing is measured."""
        mix = {name: weights.get(name, 0.0) / sum(weights.values()) for name in run.mix}
        if mix == run.mix:
            return profile

        def add_up() -> dict[str, str]:
            found = self._read(run.parts)
            return {"profile": self._write(run.parts, found, mix, run.hidden, run.dense, run.calibration)}

        key = ["mixture", json.dumps(mix), profile]
        return str(self._index.measure_once(key, add_up)["profile"])

    def collect_again(self, progress: Progress) -> ModelStatistics:
        """Statistics of the weights in the model now, by the run's weights, with curves about the dense ones."""
        walks = [self._find_unfinished(name, {}, "again") for name in self._settings.text]
        team, extent, layers = self._crew.team, self._crew.extent, self._weights.layers
        found = collect_texts(team, extent, layers, progress, None, self._shares, self._weights.dense, walks)
        self._refuse_infinite(found)
        for walk in walks:
            walk.forget()
        return mix_statistics(found, self._shares, self._crew.extent.gradients)

    def _collect_parts(self, progress: Progress, kind: str) -> tuple[list[ModelStatistics], dict[str, TextPart]]:
        """What each text says, as it is known and as it is kept."""
        names, moments = list(self._settings.text), dict[str, dict[str, str]]()
        known = self._read_known(names, kind)
        walks = [self._find_unfinished(name, moments.setdefault(name, {}), kind) for name in names]

        def keep_moment(text: int, leader: str, moment_II: Tensor) -> None:
            if kind == "full":
                moments[names[text]][leader] = write_moment(self._store, moment_II)

        team, extent, layers = self._crew.team, self._crew.extent, self._weights.layers
        keep = None if kind == "masks" else keep_moment
        read = {text: know_read(read_part(self._store, part, self._weights.device_of)) for text, part in known.items()}
        found = collect_texts(team, extent, layers, progress, keep, self._shares, None, walks, read)
        self._refuse_infinite(found)
        moments |= {names[text]: part.moments for text, part in known.items()}
        parts = {name: keep_part(self._store, own, moments[name]) for name, own in zip(names, found, strict=True)}
        for walk in walks:
            walk.forget()
        return found, parts

    def _read_known(self, names: Sequence[str], kind: str) -> dict[int, TextPart]:
        """What is known of texts, by their numbers, from profiles with fewer or other texts beside them."""
        found: dict[int, TextPart] = {}
        for number, name in enumerate(names):
            kept = self._index.read_measured(self._name_text(name, kind))
            if kept is not None and has_parts(self._store, kept["parts"]):
                (part,) = kept["parts"].values()
                found[number] = TextPart.model_validate(part)
        return found

    def _name_text(self, name: str, kind: str) -> list[str]:
        """What is known of a text depends on the model, on its windows and on settings, but on no other text."""
        shares = {other: float(other == name) for other in self._settings.text}
        windows = self._windows.calibration[list(self._windows.list_shares(shares))]
        digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        return ["text", *name_statistics(self._weights, self._settings, "text", "text_weights"), digest, kind]

    def _measure_curves(
        self, found: Sequence[ModelStatistics], parts: Parts, progress: Progress
    ) -> tuple[list[ModelStatistics], dict[str, TextPart]]:
        """The same with KL curves about the masks of the run's weights."""
        team, extent, layers = self._crew.team, self._crew.extent, self._weights.layers
        anew = measure_text_curves(team, extent, layers, progress, found, self._shares)
        pairs = zip(parts.items(), anew, strict=True)
        return anew, {name: part.model_copy(update={"kappa": own.kappa}) for (name, part), own in pairs}

    def _write(
        self,
        parts: Parts,
        found: Sequence[ModelStatistics],
        mix: dict[str, float],
        hidden: str,
        evaluation: Evaluation,
        text: Calibration,
    ) -> str:
        """A profile that is the sum of what was `found` of each text."""
        statistics = mix_statistics(found, list(mix.values()), self._crew.extent.gradients)
        stored = StoredProfile(
            layers=build_profile(self._weights.layers, statistics, self._weights.dense),
            means=write_means(self._store, statistics),
            moments={},
            group=statistics.group,
            hidden=hidden,
            dense=evaluation,
            calibration=text,
            few=statistics.few,
            mix=mix,
            parts=dict(parts),
        )
        return self._store.write_json(stored.model_dump())

    def _read(self, parts: Parts) -> list[ModelStatistics]:
        return [read_part(self._store, part, self._weights.device_of) for part in parts.values()]

    def _find_unfinished(self, name: str, moments: dict[str, str], kind: str) -> UnfinishedWalk:
        return find_unfinished(self._index, self._weights, self._settings, f"text {name}", moments, kind)

    def _refuse_infinite(self, found: Sequence[ModelStatistics]) -> None:
        for statistics in found:
            refuse_infinite(statistics, self._settings.dtype)
