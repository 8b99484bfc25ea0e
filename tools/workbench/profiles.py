"""Profiles of the dense model: its losses, and what calibration texts say of its layers, measured once and kept."""

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kernels.methods import LayerStatistics
from tools.base.errors import ImpossiblePlan, UnknownStatistics, UserError
from tools.base.progress import Progress, Stopped, ignore_progress
from tools.base.settings import TEAM, Calibration, WorkbenchSettings
from tools.measure.losses import Evaluation, SoFar
from tools.models.layers import Layer
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.statistics.collect import (
    ModelStatistics,
    Moments,
    begin_walk,
    collect_moments,
    collect_statistics,
)
from tools.statistics.table import build_profile
from tools.statistics.weights import weigh_block
from tools.team.cluster import Cluster
from tools.team.worker import LayerGroup, LayerWork
from tools.workbench.crew import Crew
from tools.workbench.losses import Losses
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.unfinished import UnfinishedWalk
from tools.workbench.weights import Weights


class StoredProfile(BaseModel):
    """What `Profiles.make` leaves on disk."""

    layers: list[LayerProfile]
    means: str
    moments: dict[str, str]
    """Artifact of the second moment of each group of layers; empty until a recipe needs them."""
    group: dict[str, str]
    hidden: str
    dense: Evaluation
    calibration: Calibration = "run"
    """The text that it is about."""
    few: dict[str, int] = {}
    """Layers of experts that were sent too few of its tokens (`tools.statistics.experts`), with their number."""
    mix: dict[str, float] = Field({}, exclude_if=operator.not_)
    """What each of the run's named texts counts in it, in their order and in sum 1; empty where there are none."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The same, as a walk has it."""
        return tuple(self.mix.values())


class Profiles:
    """What is known of the layers of one model."""

    def __init__(
        self,
        settings: WorkbenchSettings,
        mixed: Mapping[Calibration, Tensor],
        weights: Weights,
        store: ArtifactStore,
        index: Index,
        crew: Crew,
        losses: Losses,
    ) -> None:
        """`mixed` are the calibration texts that there are beside the run's own."""
        self._settings, self._mixed, self._weights, self._crew = settings, mixed, weights, crew
        self._store, self._index, self._losses = store, index, losses
        self._last: tuple[str, StoredProfile, dict[str, Tensor]] | None = None
        self._shared: tuple[str, LayerStatistics] | None = None

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
            walk = self._find_unfinished("run", {}, "again")
            table = build_profile(layers, self._collect("run", progress, None, walk, dense), dense)
            walk.forget()
            return self._store.write_json(self.read(first).model_copy(update={"layers": table}).model_dump())
        self._weights.restore_dense()
        return self._profile_text("run", *self._measure_dense(progress), progress, full=not masks_only)

    def _measure_dense(self, progress: Progress) -> tuple[str, Evaluation]:
        """(artifact of the dense model's hidden states, its losses) on the validation text."""
        every = range(self._losses.count_windows("validation"))
        key = ["unfinished", *self._name_dense(), "validation"]
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
        if not evaluation.finite:
            raise UserError("the dense model's loss is not finite on the validation text; try --dtype fp32")
        if begun := self._index.read_measured(key):
            self._index.forget_measured(key)
            self._store.path(begun["hidden"], ".safetensors").unlink(missing_ok=True)
        return self._store.write_tensors({"hidden": hidden}), evaluation

    def read_further(self, windows: range, progress: Progress) -> Tensor:
        """The dense model's hidden states (B, T, D), on the CPU, on some further windows of each validation text.

        Measured once; then the dense weights stay in the model. Raises UserError where its losses are not finite.
        """
        key = ["further", *self._name_dense(), str(windows)]
        found = self._index.read_measured(key)
        if found is None or not self._store.has(found["hidden"], ".safetensors"):
            self._weights.restore_dense()
            numbers = self._losses.list_each("further", windows)
            evaluation, hidden = self._losses.measure("further", numbers, None, "dense, further validation", progress)
            if not evaluation.finite:
                raise UserError("the dense model's loss is not finite on the validation text; try --dtype fp32")
            found = self._index.keep_measured(key, {"hidden": self._store.write_tensors({"hidden": hidden})})
        return self._store.read_tensors(found["hidden"])["hidden"]

    def _read_so_far(self, key: list[str], windows: int) -> SoFar:
        """What was measured of the dense model before it was interrupted."""
        found = self._index.read_measured(key)
        if found is None or len(found["nll"]) >= windows or not self._store.has(found["hidden"], ".safetensors"):
            return SoFar()
        return SoFar(found["nll"], found["kl"], list(self._store.read_tensors(found["hidden"])["hidden"]))

    def _profile_text(
        self,
        text: Calibration,
        hidden: str,
        evaluation: Evaluation,
        progress: Progress,
        *,
        full: bool,
    ) -> str:
        """A profile of the dense model, which is in place; second moments are in it if it is `full`."""
        moments: dict[str, str] = {}

        def keep_moment(name: str, moment_II: Tensor) -> None:
            moments[name] = self._store.write_tensors({"A": moment_II})

        walk = self._find_unfinished(text, moments, "full" if full else "masks")
        statistics = self._collect(text, progress, keep_moment if full else None, walk)
        means = {f"a/{name}": value for name, value in statistics.mean_square.items()}
        means |= {f"plain/{name}": value for name, value in statistics.gradient_square.items()}
        means |= {f"clipped/{name}": value for name, value in statistics.clipped_square.items()}
        stored = StoredProfile(
            layers=build_profile(self._weights.layers, statistics, self._weights.dense),
            means=self._store.write_tensors(means),
            moments=moments,
            group=statistics.group,
            hidden=hidden,
            dense=evaluation,
            calibration=text,
            few=statistics.few,
            mix=self._settings.text_shares,
        )
        profile = self._store.write_json(stored.model_dump())
        walk.forget()
        return profile

    def _find_unfinished(self, text: Calibration, moments: dict[str, str], kind: str) -> UnfinishedWalk:
        """What an earlier walk through a text left that was interrupted, by the same weights and settings."""
        key = [*self._name_dense(), json.dumps(self._weights.installed), text, kind]
        return UnfinishedWalk(self._index, self._weights, key, moments)

    def _name_dense(self) -> list[str]:
        """What all that is known of the dense model depends on."""
        return [self._weights.hash_all_dense(), self._settings.model_dump_json(exclude=set(TEAM))]

    def _collect(
        self,
        text: Calibration,
        progress: Progress,
        keep_moment: Callable[[str, Tensor], None] | None,
        kept: UnfinishedWalk,
        dense: dict[str, Tensor] | None = None,
    ) -> ModelStatistics:
        """As `collect_statistics`. Raises UnknownStatistics too for statistics that are not finite."""
        team, extent = self._crew.team, self._crew.extent
        shares = tuple(self._settings.text_shares.values())
        statistics = collect_statistics(
            team, extent, self._weights.layers, progress, keep_moment, dense, text, kept, shares
        )
        _refuse_infinite(statistics, self._settings.dtype)
        return statistics

    def read(self, profile: str) -> StoredProfile:
        """A profile by its id. Raises DamagedArtifact."""
        return self._read(profile)[0]

    def _read(self, profile: str) -> tuple[StoredProfile, dict[str, Tensor]]:
        """With its means, which are vectors by name."""
        if self._last is None or self._last[0] != profile:
            stored = StoredProfile.model_validate(self._store.read_json(profile))
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

        That is where this run has not the text that they are to be of, and where tokens are to weigh unevenly for
        experts, each of which reads other ones.
        """
        if recipe.weighs_tokens and self._settings.text:
            raise ImpossiblePlan("tokens are not weighted where texts are, which have names; leave tokens even")
        if recipe.weighs_tokens and any(layer.pool for layer in self._weights.layers):
            raise ImpossiblePlan(
                "tokens are not weighted in mixtures of experts, each of which reads other ones; leave tokens even"
            )
        if recipe.calibration == "run" or recipe.calibration in self._mixed:
            return
        asked = f"calibration {recipe.calibration!r}"
        if self._settings.text:
            raise ImpossiblePlan(f"{asked} is for runs without named texts; leave it at 'run'")
        if not self._settings.questions:
            raise ImpossiblePlan(f"{asked} mixes questions in, and this run has none; leave it at 'run'")
        count = self._settings.mixes.get(recipe.calibration)
        if count is None:
            raise ImpossiblePlan(f"{asked} has no more questions than the run's own text; leave it at 'run'")
        raise ImpossiblePlan(f"{asked} needs {count} windows of questions that are in no other text; there are fewer")

    def find(self, profile: str, recipe: Recipe, progress: Progress) -> str:
        """The profile that a recipe's statistics come from: `profile`, or one of the dense model on the recipe's text.

        Of that nothing but its statistics differs. Measured once, then read back. Raises ImpossiblePlan.
        """
        if recipe.calibration == "run":
            return profile
        self.refuse_statistics(recipe)
        run = self.read(profile)
        full = bool(run.moments)

        def measure() -> dict[str, str]:
            self._weights.restore_dense()
            return {"profile": self._profile_text(recipe.calibration, run.hidden, run.dense, progress, full=full)}

        return str(self._index.measure_once(self._name_mixed(profile, recipe), measure)["profile"])

    def find_known(self, profile: str, recipe: Recipe) -> str:
        """As `find`, without any measurement; "" where it was never measured."""
        if recipe.calibration == "run":
            return profile
        return str((self._index.read_measured(self._name_mixed(profile, recipe)) or {}).get("profile", ""))

    def _name_mixed(self, profile: str, recipe: Recipe) -> list[str]:
        """What the profile of another text depends on beside that text: the run's own names model and settings."""
        run = self.read(profile)
        return ["profile", recipe.calibration, run.means, run.hidden, "full" if run.moments else "masks"]

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
            moment_II = present.second_moment.get(name, present.second_moment.get(leader))
            return LayerStatistics(present.mean_square[leader], gamma_O, moment_II)
        if not recipe.changes_survivors:
            return LayerStatistics(means[f"a/{name}"].to(device), gamma_O)
        moments = self.find_moments(profile, weighted=recipe.weighs_tokens)
        digest = moments[name if recipe.weighs_tokens else stored.group[name]]
        if self._shared is None or self._shared[0] != digest:  # neighbours share one; only one is held
            moment_II = self._store.read_tensors(digest)["A"].to(device)
            statistics = LayerStatistics(means[f"a/{name}"].to(device), gamma_O, moment_II)
        else:
            statistics = self._shared[1].for_outputs(gamma_O)
        self._shared = (digest, statistics)
        return statistics

    def find_moments(
        self, profile: str, progress: Progress = ignore_progress, *, weighted: bool = False
    ) -> dict[str, str]:
        """Artifact of each second moment; where the profile was made for masks alone, measured in the dense model.

        Those in which tokens are `weighted` are one for each layer, and always measured when they are first asked for.
        """
        stored = self.read(profile)
        if weighted:
            self.find_token_weights(profile, progress)
            measure = partial(self._measure_moments, stored, progress, profile)
            return self._index.measure_once(["weighted moments", stored.means], measure)
        measure = partial(self._measure_moments, stored, progress)
        return stored.moments or self._index.measure_once(["moments", stored.means], measure)

    def _measure_moments(self, stored: StoredProfile, progress: Progress, weighed: str = "") -> dict[str, str]:
        """By the weights of tokens of the profile `weighed`, where one is given."""
        self._weights.restore_dense()
        artifacts: dict[str, str] = {}
        grouped, team = self._weights.by_block, self._crew.team
        kind, label = ("weighted moments", "weighted second moments") if weighed else ("moments", "second moments")
        with begin_walk(team, stored.calibration, shares=stored.shares) as walk:
            for block, layers in enumerate(grouped):
                progress(label, block, len(grouped))

                def measure(block: int = block, layers: Sequence[Layer] = layers) -> dict[str, str]:
                    weights = self.read_token_weights(weighed, block) if weighed else None
                    moments = collect_moments(team, self._crew.extent, walk, block, layers, weights=weights)
                    return {
                        name: self._store.write_tensors({"A": moment_II})
                        for name, moment_II in moments.second_moment.items()
                    }

                artifacts |= self._index.measure_files([kind, stored.means, str(block)], measure)
        progress(label, len(grouped), len(grouped))
        return artifacts

    def find_token_weights(self, profile: str, progress: Progress) -> None:
        """Weights of all tokens of the profile's text, in the dense model: measured once, block by block from the last.

        Gradients flow back through every window of the text, and not the gradient windows alone.
        """
        stored, grouped, team = self.read(profile), self._weights.by_block, self._crew.team
        names = [["token weights", stored.means, str(block)] for block in range(len(grouped))]
        known = map(self._index.read_measured, names)
        if all(made is not None and self._store.has(made["weights"], ".safetensors") for made in known):
            return
        self._weights.restore_dense()
        with begin_walk(team, stored.calibration, every=True) as walk:
            for done, block in enumerate(reversed(range(len(grouped)))):
                progress("token weights", done, len(grouped))

                def measure(block: int = block) -> dict[str, str]:
                    weights = weigh_block(team, self._crew.extent, walk, block, grouped[block])
                    return {"weights": self._store.write_tensors(weights)}

                self._index.measure_files(names[block], measure)
        progress("token weights", len(grouped), len(grouped))

    def read_token_weights(self, profile: str, block: int) -> dict[str, Tensor]:
        """What `find_token_weights` found for the layers of a block: (windows, T), fp32, on the CPU."""
        made = self._index.read_measured(["token weights", self.read(profile).means, str(block)])
        assert made is not None, "they are found before layers are pruned"
        return self._store.read_tensors(made["weights"])

    def list_work(
        self,
        cluster: Cluster,
        zeros: Mapping[str, int],
        profile: str,
        recipe: Recipe,
        present: Moments | None = None,
    ) -> Iterator[LayerGroup]:
        """What workers need to prune layers: those together that stand together and share a second moment."""
        shared = recipe.changes_survivors and not recipe.weighs_tokens
        group = self.read(profile).group if shared else {}
        for _, names in groupby(zeros, lambda name: group.get(name, name)):
            work, moment_II = [], None
            for name in names:
                statistics = self.find_statistics(profile, name, recipe, present)
                dense, gamma_O = cluster.keep_dense(name), statistics.gradient_square_O
                work.append(LayerWork(name, zeros[name], dense, statistics.mean_square_I, gamma_O))
                moment_II = statistics.second_moment_II if recipe.changes_survivors else None
            yield LayerGroup(work, moment_II)


def _refuse_infinite(statistics: ModelStatistics, dtype: str) -> None:
    for values in (statistics.mean_square, statistics.gradient_square):
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise UnknownStatistics(
                    f"activations or gradients of {name} are not finite in {dtype}; try --dtype fp32 or bf16"
                )
