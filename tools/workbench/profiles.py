"""Profiles of the dense model: its losses, and what calibration texts say of its layers, measured once and kept."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import groupby

import torch
from pydantic import ValidationError
from torch import Tensor

from billhook_kernels.methods import LayerStatistics
from tools.base.errors import BrokenBaseline, DamagedArtifact, ImpossiblePlan, UserError, explain_work
from tools.base.progress import Progress, Stopped, ignore_progress
from tools.base.settings import QUESTIONS, RUN, Calibration, WorkbenchSettings
from tools.measure.losses import SoFar
from tools.plans.mix import refuse_unknown
from tools.plans.recipe import Recipe
from tools.results.losses import Evaluation
from tools.statistics.collect import Moments, collect_questions, collect_statistics
from tools.statistics.known import ModelStatistics, know_nothing, refuse_infinite
from tools.statistics.table import build_profile, list_weights
from tools.team.cluster import Cluster
from tools.team.worker import LayerGroup, LayerWork
from tools.texts.windows import Windows
from tools.workbench.losses import Crew, Losses
from tools.workbench.mixtures import Mixtures
from tools.workbench.moments import Found, Held, SecondMoments, write_moment
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.unfinished import (
    Kind,
    StoredProfile,
    TextPart,
    UnfinishedWalk,
    find_unfinished,
    keep_part,
    name_dense,
    read_part,
    write_means,
)
from tools.workbench.weights import Weights

KeepMoment = Callable[[str, Tensor], None]
"""Told the name of a group of layers and the second moment of what they read, (I, I)."""


class Profiles:
    """What is known of the layers of one model."""

    def __init__(
        self,
        settings: WorkbenchSettings,
        windows: Windows,
        weights: Weights,
        store: ArtifactStore,
        index: Index,
        crew: Crew,
        losses: Losses,
        at_once: int | None = None,
    ) -> None:
        """`at_once` is as in `SecondMoments`."""
        self._settings, self._windows, self._weights, self._crew = settings, windows, weights, crew
        self._store, self._index, self._losses = store, index, losses
        self._moments = SecondMoments(weights, store, index, crew, at_once)
        self._mixtures = Mixtures(settings, windows, weights, store, index, crew)
        self._last: tuple[str, StoredProfile, dict[str, Tensor]] | None = None
        self._shared: tuple[list[tuple[str | Held, float]], LayerStatistics] | None = None

    @explain_work("profiling the model", BrokenBaseline)
    def make(self, progress: Progress, first: str = "", *, masks_only: bool = False) -> str:
        """Statistics, KL curves and the dense model's losses, kept as artifacts; the id of the profile.

        With `masks_only` the second moments of the dense model's inputs wait until a recipe that changes survivors
        asks for them.

        The first profile is that of the dense model. Given its id, another is made of the weights in the model now:
        the activations and gradients behind scores and curves are theirs, while both stay about the dense weights,
        which all pruning starts from. What layers are pruned by stays the dense model's: by what a pruned model, which
        was fitted to this text, reads and passes back they come out far worse.
        """
        layers, dense = self._weights.layers, self._weights.dense
        if first:
            table = build_profile(layers, self._collect_again(progress), dense)
            own = {"layers": table, "first": self._find_first(first)}
            return self._store.write_json(self.read(first).model_copy(update=own).model_dump())
        self._weights.restore_dense()
        return self._profile_dense(
            *self._measure_dense(progress), progress, "masks" if masks_only else self._moments.kind
        )

    @explain_work("measuring the dense model", BrokenBaseline)
    def make_bare(self, progress: Progress) -> str:
        """The dense model's losses alone, kept as an artifact: the profile of a run that takes whole parts away.

        Nothing is known of layers but their weights; all outputs of a layer count alike.
        """
        self._weights.restore_dense()
        hidden, evaluation = self._measure_dense(progress)
        statistics = know_nothing()
        for layer in self._weights.layers:
            statistics.gradient_square[layer.name] = torch.ones(layer.weight_OI.shape[0])
        stored = StoredProfile(
            layers=list_weights(self._weights.layers, self._weights.dense),
            means=write_means(self._store, statistics),
            moments={},
            group={},
            hidden=hidden,
            dense=evaluation,
        )
        return self._store.write_json(stored.model_dump())

    def _measure_dense(self, progress: Progress) -> tuple[str, Evaluation]:
        """(artifact of the dense model's hidden states, its losses) on the validation text; measured once."""
        every, dense = range(self._losses.count_windows("validation")), name_dense(self._weights, self._settings)
        measured, key = ["dense", *dense, "validation"], ["unfinished", *dense, "validation"]
        known = self._index.read_measured(measured)
        if known is not None and self._store.has(known["hidden"], ".safetensors"):
            return known["hidden"], Evaluation.model_validate(known["evaluation"])
        so_far = self._read_so_far(key, len(every))
        try:
            evaluation, hidden = self._losses.measure(
                "validation", every, None, "dense validation", progress, so_far=so_far
            )
        except Stopped:
            if so_far.nll:
                kept = self._store.write_tensors({"hidden": torch.stack(so_far.hidden)})
                self._index.keep_measured(key, {"nll": so_far.nll, "kl": so_far.kl, "hidden": kept})
            raise
        _refuse_infinite_loss(evaluation)
        if begun := self._index.read_measured(key):
            self._index.forget_measured(key)
            self._store.path(begun["hidden"], ".safetensors").unlink(missing_ok=True)
        artifact = self._store.write_tensors({"hidden": hidden})
        self._index.keep_measured(measured, {"hidden": artifact, "evaluation": evaluation.model_dump()})
        return artifact, evaluation

    def _read_so_far(self, key: list[str], windows: int) -> SoFar:
        """What was measured of the dense model before it was interrupted."""
        found = self._index.read_measured(key)
        if found is None or len(found["nll"]) >= windows or not self._store.has(found["hidden"], ".safetensors"):
            return SoFar()
        return SoFar(found["nll"], found["kl"], list(self._store.read_tensors(found["hidden"])["hidden"]))

    def _profile_dense(self, hidden: str, evaluation: Evaluation, progress: Progress, kind: Kind) -> str:
        """A profile of the dense model, which is in place."""
        if self._settings.text:
            return self._mixtures.make(hidden, evaluation, progress, kind)
        moments, keep_moment, walk = self._begin(RUN, kind)
        statistics = self._collect(progress, keep_moment, walk)
        stored = StoredProfile(
            layers=build_profile(self._weights.layers, statistics, self._weights.dense),
            means=write_means(self._store, statistics),
            moments=moments,
            passed=kind == "passed",
            group=statistics.group,
            hidden=hidden,
            dense=evaluation,
            few=statistics.few,
        )
        profile = self._store.write_json(stored.model_dump())
        walk.forget()
        return profile

    def _begin(self, text: Calibration, kind: Kind) -> tuple[dict[str, str], KeepMoment | None, UnfinishedWalk]:
        """(artifacts of second moments, who is told of each if they are made, what is kept of the walk)."""
        moments: dict[str, str] = {}

        def keep_moment(name: str, moment_II: Tensor) -> None:
            if kind == "full":
                moments[name] = write_moment(self._store, moment_II)

        keep = None if kind == "masks" else keep_moment
        return moments, keep, find_unfinished(self._index, self._weights, self._settings, text, moments, kind)

    def _collect_again(self, progress: Progress) -> ModelStatistics:
        """Statistics of the weights in the model now, with curves about the dense ones."""
        if self._settings.text:
            return self._mixtures.collect_again(progress)
        walk = find_unfinished(self._index, self._weights, self._settings, RUN, {}, "again")
        statistics = self._collect(progress, None, walk, self._weights.dense)
        walk.forget()
        return statistics

    def _collect(
        self,
        progress: Progress,
        keep_moment: KeepMoment | None,
        kept: UnfinishedWalk,
        dense: Mapping[str, Tensor] | None = None,
    ) -> ModelStatistics:
        """As `collect_statistics`. Raises UnknownStatistics too for statistics that are not finite."""
        team, extent = self._crew.team, self._crew.extent
        statistics = collect_statistics(team, extent, self._weights.layers, progress, keep_moment, dense, kept)
        refuse_infinite(statistics, self._settings.dtype)
        return statistics

    def read(self, profile: str) -> StoredProfile:
        """A profile by its id. Raises DamagedArtifact."""
        return self._read(profile)[0]

    def _read(self, profile: str) -> tuple[StoredProfile, dict[str, Tensor]]:
        """With its means, which are vectors by name."""
        if self._last is None or self._last[0] != profile:
            try:
                stored = StoredProfile.model_validate(self._store.read_json(profile))
            except ValidationError as error:
                raise DamagedArtifact(f"profile {profile[:12]} is of another version; begin a new run") from error
            stored = stored.sort_texts(self._settings.mixable)
            self._last = (profile, stored, self._store.read_tensors(stored.means))
        return self._last[1:]

    def read_hidden(self, profile: str) -> Tensor:
        """The dense model's hidden states on the validation text (B, T, D), on the CPU."""
        return self._store.read_tensors(self.read(profile).hidden)["hidden"]

    def let_go(self) -> None:
        """Hold no second moment on the device."""
        self._shared = None

    # --- the text that statistics come from --------------------------------------------------------------------

    def refuse_statistics(self, recipe: Recipe) -> None:
        """Raises ImpossiblePlan in one line where there are no statistics as a recipe asks for.

        That is where this run has not the texts that they are to be of.
        """
        refuse_unknown(recipe.mix, self._settings.mixable)
        windows = self._settings.calibration_windows
        if recipe.mix and self._settings.mixes_questions and QUESTIONS not in self._windows.mixed:
            raise ImpossiblePlan(
                f"mix needs {windows} windows of questions that are in no other text; there are fewer, or one of them "
                "is; leave it out"
            )

    def find(self, profile: str, recipe: Recipe, progress: Progress) -> str:
        """The profile that a recipe's statistics come from: `profile`, or its mixture of texts.

        Of that nothing but its statistics differs. A mixture is a sum, and nothing is measured for it but, once, what
        the dense model makes of questions where these are one of the texts. Raises ImpossiblePlan.
        """
        if not recipe.mix:
            return profile
        self.refuse_statistics(recipe)
        if self._settings.mixes_questions:
            profile = self._find_beside(self._find_first(profile), progress)
        return self._mixtures.find(self.read(profile), profile, dict(recipe.mix))

    def find_known(self, profile: str, recipe: Recipe) -> str:
        """As `find`, without any measurement; "" where it was never measured."""
        if not recipe.mix or not self._settings.mixes_questions:
            return self.find(profile, recipe, ignore_progress)
        self.refuse_statistics(recipe)
        known = self._index.read_measured(self._name_beside(self._find_first(profile)))
        return self.find(profile, recipe, ignore_progress) if known else ""

    def _find_first(self, profile: str) -> str:
        """The profile of the dense model that another one came of, or it is itself."""
        return self.read(profile).first or profile

    def _find_beside(self, first: str, progress: Progress) -> str:
        """The profile of the dense model of which questions are a second text, which counts nothing in it."""
        run = self.read(first)

        def measure() -> dict[str, str]:
            self._weights.restore_dense()
            kappa = {layer.name: layer.kappa for layer in run.layers}
            gradient = {layer.name: layer.gradient for layer in run.layers}
            own = TextPart(
                means=run.means, moments=run.moments, group=run.group, gradient=gradient, kappa=kappa, few=run.few
            )
            parts = {
                QUESTIONS: self._collect_questions(own, progress, "masks" if run.masks_only else self._moments.kind),
                RUN: own,
            }
            both = {"calibration": QUESTIONS, "mix": {QUESTIONS: 0.0, RUN: 1.0}, "parts": parts}
            return {"profile": self._store.write_json(run.model_copy(update=both).model_dump())}

        return str(self._index.measure_once(self._name_beside(first), measure)["profile"])

    def _name_beside(self, first: str) -> list[str]:
        """What that depends on: the run's own profile names model and settings."""
        digest = hashlib.sha256(self._windows.mixed[QUESTIONS].numpy().tobytes()).hexdigest()
        return ["beside", first, digest]

    def _collect_questions(self, run: TextPart, progress: Progress, kind: Kind) -> TextPart:
        """What questions say of the dense model, which is in place."""
        moments, keep_moment, walk = self._begin(QUESTIONS, kind)
        masks, team = read_part(self._store, run, self._weights.device_of), self._crew.team
        found = collect_questions(team, self._crew.extent, self._weights.layers, progress, keep_moment, masks, walk)
        refuse_infinite(found, self._settings.dtype)
        part = keep_part(self._store, found, moments)
        walk.forget()
        return part

    # --- what layers are pruned by -----------------------------------------------------------------------------

    def find_statistics(
        self, profile: str, name: str, recipe: Recipe, present: Moments | None = None
    ) -> LayerStatistics:
        """What is known of a layer: from the profile; its inputs from `present` moments where these are given."""
        stored, means = self._read(profile)
        device = self._weights.device_of(name)
        gamma_O = means[f"{recipe.gamma}/{name}"].to(device)
        if present is not None:
            leader = present.group[name]
            moment_II = present.second_moment.get(leader)
            if moment_II is not None:
                moment_II = moment_II.to(device)
            return LayerStatistics(present.mean_square[leader].to(device), gamma_O, moment_II)
        if not recipe.changes_survivors:
            return LayerStatistics(means[f"a/{name}"].to(device), gamma_O)
        moments = self.find_moments(profile)
        if stored.parts:
            shared = {text: share for text, share in stored.mix.items() if share}
            terms = [(moments[f"{text} {stored.parts[text].group[name]}"], share) for text, share in shared.items()]
        else:
            terms = [(moments[stored.group[name]], 1.0)]
        if self._shared is None or self._shared[0] != terms:  # neighbours share one; only one is held
            moment_II = self._moments.add_up(terms, device)
            statistics = LayerStatistics(means[f"a/{name}"].to(device), gamma_O, moment_II)
        else:
            statistics = self._shared[1].for_outputs(gamma_O)
        self._shared = (terms, statistics)
        return statistics

    def find_moments(self, profile: str, progress: Progress = ignore_progress) -> Found:
        """As `SecondMoments.find`."""
        return self._moments.find(self.read(profile), progress)

    @property
    def keeps_moments(self) -> bool:
        """Whether second moments that are measured stay on disk."""
        return self._moments.kind == "full"

    def lacks_moments(self, profile: str, recipe: Recipe) -> bool:
        """Whether layers that a recipe prunes as in the dense model want second moments that are not kept."""
        if recipe.in_order or not recipe.changes_survivors:
            return False
        return self._moments.lacks(self.read(profile))

    def pass_moments(
        self, profile: str, progress: Progress, *, down: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """As `SecondMoments.pass_blocks`."""
        return self._moments.pass_blocks(self.read(profile), progress, self.let_go, down=down)

    def list_work(
        self,
        cluster: Cluster,
        zeros: Mapping[str, int],
        profile: str,
        recipe: Recipe,
        present: Moments | None = None,
    ) -> Iterator[LayerGroup]:
        """What workers need to prune layers: those together that stand together and share a second moment."""
        group = self.read(profile).group if recipe.changes_survivors else {}
        for _, names in groupby(zeros, lambda name: group.get(name, name)):
            work, moment_II = [], None
            for name in names:
                statistics = self.find_statistics(profile, name, recipe, present)
                dense, gamma_O = cluster.keep_dense(name), statistics.gradient_square_O
                work.append(LayerWork(name, zeros[name], dense, statistics.mean_square_I, gamma_O))
                moment_II = statistics.second_moment_II if recipe.changes_survivors else None
            yield LayerGroup(work, moment_II)


def _refuse_infinite_loss(dense: Evaluation) -> None:
    if not dense.finite:
        raise UserError("the dense model's loss is not finite on the validation text; try --dtype fp32")
