"""The one loaded model of a run: its layers, splits, statistics, and the weights that are in it now.

Everything it makes goes to disk under the hash of its content, so a killed run goes on where it was.
"""

import gc
import hashlib
import json
import math
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from kernels.damping import DAMPING
from kernels.methods import LayerStatistics
from kernels.packed import pack_bits
from tools.base.errors import DamagedArtifact, ImpossiblePlan, UserError
from tools.base.files import ArtifactStore, explain_full_disk, write_json
from tools.base.progress import Progress, count_up
from tools.base.rundir import lock_run, unlock_run
from tools.base.settings import Calibration, Split, TeamSettings, WorkbenchSettings
from tools.measure.losses import Evaluation, PrefixCache, evaluate_windows, limit_prefix
from tools.measure.recall import EncodedPair, Recall, cut_batches, encode_pairs, measure_recall, put_together
from tools.models.artifacts import hash_as_earlier, pack_pruned, unpack_pruned
from tools.models.blocks import Blocks
from tools.models.disk import list_disk
from tools.models.layers import Layer, find_layers, find_unprunable
from tools.models.load import load_model
from tools.models.readout import check_readout
from tools.plans.layer_profile import LayerProfile
from tools.plans.methods import REFIT_STEPS
from tools.plans.recipe import Recipe, count_pattern_zeros
from tools.plans.work_order import WorkOrder
from tools.statistics.collect import (
    ModelStatistics,
    Moments,
    begin_walk,
    build_profile,
    collect_moments,
    collect_statistics,
    measure_kappa,
    work_alone,
)
from tools.statistics.scores import measure_alpha
from tools.statistics.walks import layers_by_block
from tools.team.cluster import Cluster
from tools.team.worker import LayerWork, Texts, cut_to_levels, prune_layer
from tools.texts.questions import split_questions
from tools.texts.windows import cut_windows

DENSE = "dense"
"""Id of the unpruned weights, as a checkpoint and as a layer's artifact."""

Warn = Callable[[str], None]


class LayerRecord(BaseModel):
    """One layer of a checkpoint: where its weights lie, and how many of them were to go."""

    artifact: str
    zeros: int


class Checkpoint(BaseModel):
    """A manifest: the weights of all layers, and how they were made, to make them again."""

    profile: str
    recipe: Recipe
    layers: dict[str, LayerRecord]


class StoredProfile(BaseModel):
    """What `Workbench.profile` leaves on disk."""

    layers: list[LayerProfile]
    means: str
    moments: dict[str, str]
    """Artifact of the second moment of each group of layers; empty until a recipe needs them."""
    group: dict[str, str]
    hidden: str
    dense: Evaluation
    calibration: Calibration = "run"
    """The text that it is about."""


class Workbench:
    """Owns one loaded model. Raises UserError when model or texts cannot be had."""

    def __init__(self, settings: TeamSettings, directory: Path, warn: Warn, progress: Progress) -> None:
        self.settings, self.directory, self.warn = settings, directory, warn
        progress("load model", 0, 1)
        self.store = ArtifactStore(directory / "artifacts")
        self.model, self.tokenizer = load_model(settings)
        self.device = self.model.device
        self.layers = find_layers(self.model)
        self.by_name = {layer.name: layer for layer in self.layers}
        for name in find_unprunable(self.model):
            warn(f"{name} is not a plain linear layer and stays dense")
        self._refuse_small_disk()
        self.windows = cut_windows(settings, self.tokenizer)
        self.questions = _encode_questions(settings, self.tokenizer)
        check_readout(self.model, self.windows.calibration[0].to(self.device))
        self.dense = {layer.name: layer.weight_OI.to("cpu", copy=True).contiguous() for layer in self.layers}
        self.installed = dict.fromkeys(self.by_name, DENSE)
        self._profile: tuple[str, StoredProfile, dict[str, Tensor]] | None = None
        self._shared: tuple[str, LayerStatistics] | None = None
        self._calibration_hidden: Tensor | None = None
        blocks = Blocks(self.model)
        self._prefix = PrefixCache(blocks, self.windows.validation, limit_prefix(self.model))
        calibration = self.windows.calibration.to(self.device)
        self._team, self._extent = work_alone(
            blocks,
            self.layers,
            calibration,
            settings.gradient_windows,
            settings.seed,
            directory,
            self.windows.mixed,
        )
        self.cluster = self._gather_workers() if settings.workers else None
        self._team = self.cluster or self._team
        progress("load model", 1, 1)

    def _gather_workers(self) -> Cluster:
        texts = Texts(self.windows, self.questions)
        return Cluster(self.settings, texts, self, self.model, lambda text: self.warn(text))

    def close(self) -> None:
        """Let workers go that were gathered."""
        if self.cluster is not None:
            self.cluster.close()

    @property
    def abreast(self) -> int:
        """How many checkpoints are measured at once: one by each worker, or one by this process alone."""
        return self.cluster.size if self.cluster else 1

    def read_artifact(self, name: str, artifact: str) -> dict[str, Tensor]:
        """A layer's mask, and its values unless they are the dense weights'. Raises DamagedArtifact."""
        try:
            return self.store.read_tensors(artifact)
        except DamagedArtifact:
            if artifact != self.installed[name]:
                raise
            return pack_pruned(self.by_name[name].weight_OI, values=True)  # what is in the model is whole

    def _device_of(self, name: str) -> torch.device:
        return self.by_name[name].weight_OI.device

    def _refuse_small_disk(self) -> None:
        """All that a run may write must fit."""
        needed = sum(line.bytes for line in list_disk(self.model, self.layers, self.settings))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                f"the disk is full: a run of this model may write {needed / 1e9:.1f} GB to {self.directory}, "
                f"but {free / 1e9:.1f} GB are free; free some, or use another --runs-dir"
            )

    # --- profile -----------------------------------------------------------------------------------------------

    def profile(self, progress: Progress, first: str = "", *, masks_only: bool = False) -> str:
        """Statistics, KL curves and the dense model's losses, kept as artifacts; the id of the profile.

        With `masks_only` the second moments of the dense model's inputs wait until a recipe that changes survivors
        asks for them.

        The first profile is that of the dense model. Given its id, another is made of the weights in the model now:
        the activations and gradients behind scores and curves are theirs, while both stay about the dense weights,
        which all pruning starts from. What layers are pruned by stays the dense model's: by what a pruned model, which
        was fitted to this text, reads and passes back they come out far worse.
        """
        if first:
            layers = build_profile(self.layers, self._collect_statistics("run", progress, None, self.dense), self.dense)
            return self.store.write_json(self.read_profile(first).model_copy(update={"layers": layers}).model_dump())
        self.restore(DENSE)
        return self._profile_text("run", *self._dense_losses(progress), progress, full=not masks_only)

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
            moments[name] = self.store.write_tensors({"A": moment_II})

        statistics = self._collect_statistics(text, progress, keep_moment if full else None)
        means = {f"a/{name}": value for name, value in statistics.mean_square.items()}
        means |= {f"plain/{name}": value for name, value in statistics.gradient_square.items()}
        means |= {f"clipped/{name}": value for name, value in statistics.clipped_square.items()}
        stored = StoredProfile(
            layers=build_profile(self.layers, statistics, self.dense),
            means=self.store.write_tensors(means),
            moments=moments,
            group=statistics.group,
            hidden=hidden,
            dense=evaluation,
            calibration=text,
        )
        return self.store.write_json(stored.model_dump())

    def _collect_statistics(
        self,
        text: Calibration,
        progress: Progress,
        keep_moment: Callable[[str, Tensor], None] | None,
        dense: dict[str, Tensor] | None = None,
    ) -> ModelStatistics:
        """As `collect_statistics`. Raises UserError too for statistics that are not finite."""
        statistics = collect_statistics(self._team, self._extent, self.layers, progress, keep_moment, dense, text)
        _refuse_infinite(statistics, self.settings.dtype)
        return statistics

    def refuse_calibration(self, recipe: Recipe) -> None:
        """Raises ImpossiblePlan in one line where this run has not the text that a recipe's statistics are to be of."""
        if recipe.calibration == "run" or recipe.calibration in self.windows.mixed:
            return
        asked = f"calibration {recipe.calibration!r}"
        if not self.settings.questions:
            raise ImpossiblePlan(f"{asked} mixes questions in, and this run has none; leave it at 'run'")
        count = self.settings.mixes.get(recipe.calibration)
        if count is None:
            raise ImpossiblePlan(f"{asked} has no more questions than the run's own text; leave it at 'run'")
        raise ImpossiblePlan(f"{asked} needs {count} windows of questions that are in no other text; there are fewer")

    def find_profile(self, profile: str, recipe: Recipe, progress: Progress) -> str:
        """The profile that a recipe's statistics come from: `profile`, or one of the dense model on the recipe's text.

        Of that nothing but its statistics differs. Measured once, then read back. Raises ImpossiblePlan.
        """
        if recipe.calibration == "run":
            return profile
        self.refuse_calibration(recipe)
        run = self.read_profile(profile)
        full = bool(run.moments)

        def measure() -> dict[str, str]:
            self.restore(DENSE)
            return {"profile": self._profile_text(recipe.calibration, run.hidden, run.dense, progress, full=full)}

        return str(self._measure_once(_profile_key(recipe), measure)["profile"])

    def _dense_losses(self, progress: Progress) -> tuple[str, Evaluation]:
        """(artifact of the dense model's hidden states, its losses) on the validation text."""
        every = range(len(self.windows.validation))
        evaluation, hidden = self._evaluate("validation", every, None, "dense validation", progress)
        if not evaluation.finite:
            raise UserError("the dense model's loss is not finite on the validation text; try --dtype fp32")
        return self.store.write_tensors({"hidden": hidden}), evaluation

    def read_profile(self, profile: str) -> StoredProfile:
        """A profile by its id. Raises DamagedArtifact."""
        if self._profile is None or self._profile[0] != profile:
            stored = StoredProfile.model_validate(self.store.read_json(profile))
            self._profile = (profile, stored, self.store.read_tensors(stored.means))
        return self._profile[1]

    def _statistics_of(
        self, profile: str, name: str, recipe: Recipe, present: Moments | None = None
    ) -> LayerStatistics:
        """What is known of a layer: from the profile; its inputs from `present` moments where these are given."""
        stored = self.read_profile(profile)
        assert self._profile is not None
        means = self._profile[2]
        device = self._device_of(name)
        gamma_O = means[f"{recipe.gamma}/{name}"].to(device)
        if present is not None:
            leader = present.group[name]
            moment_II = present.second_moment[leader]
            return LayerStatistics(moment_II.diagonal(), gamma_O, moment_II)
        if not recipe.changes_survivors:
            return LayerStatistics(means[f"a/{name}"].to(device), gamma_O)
        digest = self._find_moments(profile)[stored.group[name]]
        if self._shared is None or self._shared[0] != digest:  # neighbours share one; only one is held
            moment_II = self.store.read_tensors(digest)["A"].to(device)
            statistics = LayerStatistics(means[f"a/{name}"].to(device), gamma_O, moment_II)
        else:
            statistics = self._shared[1].for_outputs(gamma_O)
        self._shared = (digest, statistics)
        return statistics

    def _find_moments(self, profile: str, progress: Progress = lambda *_: None) -> dict[str, str]:
        """Artifact of each second moment; where the profile was made for masks alone, measured in the dense model."""
        stored = self.read_profile(profile)
        measure = partial(self._measure_moments, stored.calibration, progress)
        return stored.moments or self._measure_once(["moments", stored.means], measure)

    def _measure_moments(self, text: Calibration, progress: Progress) -> dict[str, str]:
        self.restore(DENSE)
        artifacts: dict[str, str] = {}
        grouped = self._layers_by_block()
        with begin_walk(self._team, text) as walk:
            for block, layers in enumerate(grouped):
                progress("second moments", block, len(grouped))
                moments = collect_moments(self._team, self._extent, walk, block, layers).second_moment
                artifacts |= {name: self.store.write_tensors({"A": moment_II}) for name, moment_II in moments.items()}
                del moments  # they are large: let them go before those of the next block are made
        progress("second moments", len(grouped), len(grouped))
        return artifacts

    def _layers_by_block(self) -> list[list[Layer]]:
        return layers_by_block(self.layers, len(self._prefix.blocks))

    def describe_layers(self, profile: str, recipe: Recipe, progress: Progress) -> list[LayerProfile]:
        """The layers of the recipe's profile, with what its allocation needs beyond: measured once, then read back.

        Raises ImpossiblePlan where the run has not the text that the recipe's statistics are to be of.
        """
        profile = self.find_profile(profile, recipe, progress)
        layers = self.read_profile(profile).layers
        if recipe.allocation == "alphapruning" and not recipe.pattern:
            alpha = self._measure_once(["alpha"], lambda: self._measure_alphas(progress))
            return [layer.model_copy(update={"alpha": alpha[layer.name]}) for layer in layers]
        if recipe.needs_curves:
            plain = _plain(recipe)
            kappa = self._measure_once(
                _kappa_key(profile, plain), lambda: self._measure_kappa(profile, plain, progress)
            )
            return [layer.model_copy(update={"kappa": kappa[layer.name]}) for layer in layers]
        return layers

    def has_layers(self, profile: str, recipe: Recipe) -> bool:
        """Whether `describe_layers` has only to read what was measured before: no weight is touched."""
        if recipe.calibration != "run":
            profile = (self._read_measured(_profile_key(recipe)) or {}).get("profile", "")
        if not profile or not recipe.needs_curves:
            return bool(profile)
        return self._read_measured(_kappa_key(profile, _plain(recipe))) is not None

    def read_layers(self, profile: str, recipe: Recipe, progress: Progress) -> list[LayerProfile]:
        """As `describe_layers`, with the KL curves of `profile` whatever the recipe's: no weight is touched."""
        self.refuse_calibration(recipe)
        plain = recipe.model_copy(update={"curves": "mask", "calibration": "run"})
        return self.describe_layers(profile, plain, progress)

    def _measure_once(self, key: list[str], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this key, from disk if it is there and whole."""
        value = self._read_measured(key)
        return self._keep_measured(key, measure()) if value is None else value

    def _read_measured(self, key: list[str]) -> dict[str, Any] | None:
        artifact = self._read_index(".json").get(_hash_key(key), "")
        return dict(self.store.read_json(artifact)) if artifact and self.store.has(artifact, ".json") else None

    def _keep_measured(self, key: list[str], value: dict[str, Any]) -> dict[str, Any]:
        self._append_index(_hash_key(key), self.store.write_json(value))
        return value

    def _measure_alphas(self, progress: Progress) -> dict[str, float | None]:
        alphas = {}
        for i, (name, dense_OI) in enumerate(self.dense.items()):
            progress("spectra", i, len(self.dense))
            alphas[name] = measure_alpha(dense_OI.to(self._device_of(name)))
        progress("spectra", len(self.dense), len(self.dense))
        return alphas

    def _measure_kappa(self, profile: str, recipe: Recipe, progress: Progress) -> dict[str, list[float]]:
        """KL curves of what the recipe's method leaves of each layer."""
        label, done = f"KL curves of {recipe.mask_label}", 0

        def parts_of(name: str) -> Iterator[Tensor]:
            nonlocal done
            progress(label, done, len(self.layers))
            done += 1
            yield from cut_to_levels(
                recipe, self.dense[name].to(self._device_of(name)), self._statistics_of(profile, name, recipe)
            )

        def parts_of_block(layers: Sequence[Layer]) -> Any:
            nonlocal done
            names = [layer.name for layer in layers]
            if self.cluster is None:
                return {name: parts_of(name) for name in names}
            jobs = self._list_work(self.cluster, dict.fromkeys(names, 0), profile, recipe)
            kept = [answer for _, answer in self.cluster.hand_out("prune_to_levels", jobs, keeps=True)]
            progress(label, done := done + len(names), len(self.layers))
            return kept

        if recipe.changes_survivors:
            self._find_moments(profile, progress)
        self.restore(DENSE)
        text = self.read_profile(profile).calibration
        kappa = measure_kappa(self._team, self._extent, self.layers, progress, parts_of_block, text)
        progress(label, len(self.layers), len(self.layers))
        return kappa

    # --- prune and restore -------------------------------------------------------------------------------------

    def prune(self, profile: str, order: WorkOrder, progress: Progress) -> str:
        """Prune every layer from its dense weights to its number of zeros; the id of the checkpoint.

        Layers whose number of zeros and recipe were made before are read back instead of computed. Raises
        ImpossiblePlan as `describe_layers` does.
        """
        recipe = _only_recipe(order)
        profile = self.find_profile(profile, recipe, progress)
        if recipe.statistics == "sequential":
            records = self._prune_in_order(profile, order.zeros, recipe, progress)
        else:
            if recipe.changes_survivors:
                self._find_moments(profile, progress)  # before any layer is pruned: it may run the dense model
            records = self._prune_from_dense(profile, order.zeros, recipe, progress)
        return self.store.write_json(Checkpoint(profile=profile, recipe=recipe, layers=records).model_dump())

    def _prune_from_dense(
        self, profile: str, zeros: dict[str, int], recipe: Recipe, progress: Progress
    ) -> dict[str, LayerRecord]:
        """Every layer by what it reads in the dense model."""
        index = self._read_index()
        keys = {name: _layer_key(profile, name, count, recipe) for name, count in zeros.items()}
        made = {}
        for name, count in zeros.items():
            if artifact := self._install_known(name, count, recipe, index.get(keys[name], "")):
                made[name] = artifact
        progress("prune", len(made), len(zeros))
        missing = {name: count for name, count in zeros.items() if name not in made}
        for name, artifact in self._compute_all(missing, profile, recipe):
            self._append_index(keys[name], artifact)
            made[name] = artifact
            progress("prune", len(made), len(zeros))
        return {name: LayerRecord(artifact=made[name], zeros=count) for name, count in zeros.items()}

    def _install_known(self, name: str, zeros: int, recipe: Recipe, artifact: str) -> str:
        """Put in what is known: the dense weights if no more are to go, else the artifact; "" where there is none."""
        dense_OI = self.dense[name]
        patterned = recipe.group is not None and zeros == count_pattern_zeros(dense_OI.numel(), recipe.group)
        if not patterned and zeros <= int((dense_OI == 0).sum()):
            artifact = DENSE
        return artifact if artifact and self._install(name, artifact) else ""

    def _prune_in_order(
        self, profile: str, zeros: dict[str, int], recipe: Recipe, progress: Progress
    ) -> dict[str, LayerRecord]:
        """Block by block: each is pruned by what it reads in the model whose earlier blocks are pruned already."""
        grouped, index = self._layers_by_block(), self._read_index()
        records: dict[str, LayerRecord] = {}
        with begin_walk(self._team, self.read_profile(profile).calibration) as walk:
            for block, layers in enumerate(grouped):
                progress("prune in order", block, len(grouped))
                below = [record.artifact for record in records.values()]
                keys = {x.name: _layer_key(profile, x.name, zeros[x.name], recipe, below) for x in layers}
                made = {n: self._install_known(n, zeros[n], recipe, index.get(key, "")) for n, key in keys.items()}
                if not all(made.values()):
                    for layer in layers:
                        self._install(layer.name, DENSE)
                    moments = collect_moments(self._team, self._extent, walk, block, layers, purpose="pruning")
                    missing = {name: zeros[name] for name, artifact in made.items() if not artifact}
                    for name, artifact in self._compute_all(missing, profile, recipe, moments):
                        self._append_index(keys[name], artifact)
                        made[name] = artifact
                    del moments
                    for name, artifact in made.items():
                        self._install(name, artifact)
                records |= {name: LayerRecord(artifact=artifact, zeros=zeros[name]) for name, artifact in made.items()}
        progress("prune in order", len(grouped), len(grouped))
        return records

    def _compute_all(
        self, zeros: dict[str, int], profile: str, recipe: Recipe, present: Moments | None = None
    ) -> Iterator[tuple[str, str]]:
        """Prune layers, by the workers where there are some; (name, artifact) of each when it is in the model."""
        if self.cluster is None:
            for name, count in zeros.items():
                yield name, self._compute(name, count, recipe, self._statistics_of(profile, name, recipe, present))
            return
        jobs = self._list_work(self.cluster, zeros, profile, recipe, present)
        for _, results in self.cluster.hand_out("prune", jobs):
            for name, tensors, damping in results:
                yield name, self._keep(name, tensors, damping)

    def _list_work(
        self, cluster: Cluster, zeros: dict[str, int], profile: str, recipe: Recipe, present: Moments | None = None
    ) -> Iterator[tuple[Recipe, list[LayerWork], Tensor | None]]:
        """What workers need to prune layers: those together that stand together and share a second moment."""
        group = self.read_profile(profile).group if recipe.changes_survivors else {}
        for _, names in groupby(zeros, lambda name: group.get(name, name)):
            work, moment_II = [], None
            for name in names:
                statistics = self._statistics_of(profile, name, recipe, present)
                dense, gamma_O = cluster.keep_dense(name, self.dense[name]), statistics.gradient_square_O
                work.append(LayerWork(name, zeros[name], dense, statistics.mean_square_I, gamma_O))
                moment_II = statistics.second_moment_II if recipe.changes_survivors else None
            yield recipe, work, moment_II

    def _compute(self, name: str, zeros: int, recipe: Recipe, statistics: LayerStatistics) -> str:
        """Prune one layer in this process, put it into the model and on disk; its artifact."""
        pruned = prune_layer(recipe, self.dense[name].to(self._device_of(name)), statistics, zeros)
        return self._keep(name, pack_pruned(pruned.weight_OI, values=recipe.changes_survivors), pruned.damping)

    def _keep(self, name: str, tensors: dict[str, Tensor], damping: float) -> str:
        """Put a pruned layer into the model and on disk; its artifact."""
        if damping > DAMPING:
            self.warn(f"layer {name} needed damping {damping:g} instead of {DAMPING:g}: its inputs are singular")
        artifact = self.store.write_tensors(tensors)
        self._write(name, unpack_pruned(tensors, self.dense[name]), artifact)
        return artifact

    def _write(self, name: str, weight_OI: Tensor, artifact: str) -> None:
        self.installed[name] = ""  # a write that is cut short leaves neither the old weights nor the new
        self.by_name[name].write(weight_OI)
        self.installed[name] = artifact

    def _install(self, name: str, artifact: str) -> bool:
        """Put a layer's stored weights into the model; False (and a warning) when the artifact is damaged."""
        if self.installed[name] == artifact:
            return True
        if artifact == DENSE:
            weight_OI = self.dense[name]
        else:
            try:
                tensors = self.store.read_tensors(artifact)
            except DamagedArtifact as error:
                self.warn(f"{error}; layer {name} is computed again")
                self.store.path(artifact, ".safetensors").unlink(missing_ok=True)  # nobody should trip over it again
                return False
            weight_OI = unpack_pruned(tensors, self.dense[name])
        self._write(name, weight_OI, artifact)
        return True

    def restore(self, checkpoint: str) -> list[str]:
        """Put a checkpoint's weights back bit for bit; the names of the layers that differed.

        A damaged artifact is computed again and must come out with the same hash; otherwise DamagedArtifact.
        """
        changed = []
        manifest = None if checkpoint == DENSE else self._read_manifest(checkpoint)
        for name in self.by_name:
            record = manifest.layers[name] if manifest else LayerRecord(artifact=DENSE, zeros=0)
            if self.installed[name] == record.artifact:
                continue
            changed.append(name)
            if not self._install(name, record.artifact):
                assert manifest is not None, "the dense weights are in memory"
                made = self._make_again(manifest, name)
                if made != record.artifact:
                    if hash_as_earlier(self.store.read_tensors(made), self.dense[name]) != record.artifact:
                        raise DamagedArtifact(
                            f"layer {name} of checkpoint {checkpoint[:12]} is damaged and does not come out the same "
                            "again"
                        )
                    self.installed[name] = record.artifact  # the same weights
        return changed

    def _make_again(self, manifest: Checkpoint, name: str) -> str:
        """Compute a layer of a checkpoint once more; its artifact."""
        recipe, zeros = manifest.recipe, {name: record.zeros for name, record in manifest.layers.items()}
        if recipe.statistics == "sequential":
            return self._prune_in_order(manifest.profile, zeros, recipe, lambda *_: None)[name].artifact
        return self._compute(name, zeros[name], recipe, self._statistics_of(manifest.profile, name, recipe))

    def read_checkpoint(self, checkpoint: str) -> dict[str, LayerRecord]:
        """The layers of a checkpoint. Raises DamagedArtifact when its manifest is not whole."""
        if checkpoint == DENSE:
            return {name: LayerRecord(artifact=DENSE, zeros=0) for name in self.by_name}
        return self._read_manifest(checkpoint).layers

    def _read_manifest(self, checkpoint: str) -> Checkpoint:
        return Checkpoint.model_validate(self.store.read_json(checkpoint))

    def is_made_of(self, checkpoint: str, profile: str, order: WorkOrder) -> bool:
        """Whether a checkpoint is what `prune` makes of these. Raises DamagedArtifact without a whole manifest."""
        if checkpoint == DENSE:
            return False
        manifest, recipe = self._read_manifest(checkpoint), _only_recipe(order)
        if recipe.calibration != "run":  # known where it was made of it, and worth no measurement where it was not
            profile = (self._read_measured(_profile_key(recipe)) or {}).get("profile", "")
        zeros = {name: record.zeros for name, record in manifest.layers.items()}
        return (manifest.profile, manifest.recipe, zeros) == (profile, recipe, order.zeros)

    def planned_sparsity(self, checkpoint: str) -> dict[str, float]:
        """Layer name to the share of zeros that the checkpoint was made for; 0 everywhere for the dense weights."""
        return {name: r.zeros / self.dense[name].numel() for name, r in self.read_checkpoint(checkpoint).items()}

    def forget_checkpoints(self, keep: list[str]) -> None:
        """Delete the layer artifacts that none of the checkpoints to keep refers to; their recipes stay known."""
        kept = {record.artifact for checkpoint in keep for record in self.read_checkpoint(checkpoint).values()}
        for artifact in set(self._read_index().values()) - kept:
            self.store.path(artifact, ".safetensors").unlink(missing_ok=True)

    def _read_index(self, suffix: str = ".safetensors") -> dict[str, str]:
        """What was made before, by key, as files of this kind, without files that are gone or a line torn by a kill."""
        known: dict[str, str] = {}
        path = self.store.directory / "index.jsonl"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    known[entry["key"]] = entry["artifact"]
                except (ValueError, KeyError, TypeError):
                    continue
        return {k: a for k, a in known.items() if self.store.path(a, suffix).is_file()}

    def _append_index(self, key: str, artifact: str) -> None:
        path = self.store.directory / "index.jsonl"
        with explain_full_disk(path), path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": key, "artifact": artifact}))  # a torn line never swallows the next

    # --- measure -----------------------------------------------------------------------------------------------

    def evaluate(self, checkpoint: str, split: Split, profile: str, progress: Progress, label: str = "") -> Evaluation:
        """Losses of a checkpoint on a split (`validation` or `test`); measured once, then read back."""
        if known := self._read_evaluation(checkpoint, split):
            return known
        self.restore(checkpoint)
        hidden, prefix = None, None
        if split == "validation":
            hidden = self._read_hidden(profile)
            prefix = self._prefix, self.mark_blocks(self.installed)
        every = range(len(getattr(self.windows, split)))
        evaluation, _ = self._evaluate(split, every, hidden, label or split, progress, prefix)
        write_json(self._evaluation_path(checkpoint, split), evaluation.model_dump())
        return evaluation

    def _read_evaluation(self, checkpoint: str, split: Split) -> Evaluation | None:
        """What was measured before, if it is there and whole."""
        path = self._evaluation_path(checkpoint, split)
        try:
            return Evaluation.model_validate_json(path.read_bytes()) if path.is_file() else None
        except ValueError:
            self.warn(f"{path} is damaged; {split} is measured again")
            return None

    def _read_hidden(self, profile: str) -> Tensor:
        """The dense model's hidden states on the validation text (B, T, D), on the CPU."""
        return self.store.read_tensors(self.read_profile(profile).hidden)["hidden"]

    def evaluate_each(
        self, checkpoints: Sequence[str], windows: int, profile: str, progress: Progress, label: str = "validation"
    ) -> list[Evaluation]:
        """Losses of checkpoints on the first `windows` windows of the validation text, as many at once as can be.

        The weights in the model end as they were. Losses on all of the text are kept, and read back, as by `evaluate`.
        """
        whole = windows == len(self.windows.validation)
        found: dict[str, Evaluation] = {}
        for checkpoint in checkpoints if whole else ():
            if known := self._read_evaluation(checkpoint, "validation"):
                found[checkpoint] = known
        missing = [checkpoint for checkpoint in checkpoints if checkpoint not in found]
        with self._put_back():
            hidden = self._read_hidden(profile)[:windows]
            measured = self._measure_each("validation", missing, range(windows), hidden, label, progress)
            for checkpoint, evaluation in measured:
                found[checkpoint] = evaluation
                if whole:
                    write_json(self._evaluation_path(checkpoint, "validation"), evaluation.model_dump())
        return [found[checkpoint] for checkpoint in checkpoints]

    def measure_kl_each(self, checkpoints: Sequence[str], windows: Sequence[int]) -> list[float]:
        """KL(dense || checkpoint) on some windows of the calibration text, as many checkpoints at once as can be.

        inf where it is not finite. The weights in the model end as they were.
        """
        with self._put_back():
            if self._calibration_hidden is None:
                self.restore(DENSE)
                every = range(self._extent.gradient_windows)
                self._calibration_hidden = self._evaluate("calibration", every, None, "", lambda *_: None)[1]
            hidden = self._calibration_hidden[list(windows)]
            found = dict(self._measure_each("calibration", checkpoints, windows, hidden, "", lambda *_: None))
        return [math.inf if (kl := found[checkpoint].mean_kl) is None else kl for checkpoint in checkpoints]

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """The weights in the model end as they were. Raises DamagedArtifact for those that are not to be had."""
        present = dict(self.installed)
        try:
            yield
        finally:
            for name, artifact in present.items():
                if not self._install(name, artifact):
                    raise DamagedArtifact(f"layer {name} cannot be put back: artifact {artifact[:12]} is damaged")

    def _measure_each(
        self,
        split: Literal["validation", "calibration"],
        checkpoints: Sequence[str],
        windows: Sequence[int],
        dense_hidden_BTD: Tensor,
        label: str,
        progress: Progress,
    ) -> Iterator[tuple[str, Evaluation]]:
        """Each checkpoint with its losses on some windows of a text.

        Several are handed to the workers whole, and none of their weights come into this process' model; else they come
        one after another.
        """
        left = list(dict.fromkeys(checkpoints))
        if self.cluster is not None and len(left) > 1:
            handed = self._hand_out(self.cluster, split, left.copy(), windows, dense_hidden_BTD, label, progress)
            with suppress(DamagedArtifact):  # `restore` warns of it below, and makes it again
                for checkpoint, evaluation in handed:
                    left.remove(checkpoint)
                    yield checkpoint, evaluation
        whole = split == "validation" and len(windows) == len(self.windows.validation)
        for checkpoint in left:
            self.restore(checkpoint)
            prefix = (self._prefix, self.mark_blocks(self.installed)) if whole else None
            yield checkpoint, self._evaluate(split, windows, dense_hidden_BTD, label, progress, prefix)[0]

    def _hand_out(
        self,
        cluster: Cluster,
        split: str,
        checkpoints: Sequence[str],
        windows: Sequence[int],
        dense_hidden_BTD: Tensor,
        label: str,
        progress: Progress,
    ) -> Iterator[tuple[str, Evaluation]]:
        """As `_measure_each`, whichever worker is done first. Raises DamagedArtifact."""
        tick = count_up(progress, label, len(checkpoints) * len(windows))
        job = (0, len(windows)), split, list(windows), cluster.keep(dense_hidden_BTD), False
        weights = [{name: x.artifact for name, x in self.read_checkpoint(c).items()} for c in checkpoints]
        for number, (nll, kl, _) in cluster.hand_out("losses", [job] * len(checkpoints), weights):
            tick(len(windows))
            yield checkpoints[number], Evaluation(nll=nll, kl=kl)

    def _evaluate(
        self,
        split: Split | Literal["calibration"],
        windows: Sequence[int],
        dense_hidden_BTD: Tensor | None,
        label: str,
        progress: Progress,
        prefix: tuple[PrefixCache, Sequence[str]] | None = None,
    ) -> tuple[Evaluation, Tensor]:
        """As `evaluate_windows` of some windows of a text, by the workers where there are some."""
        if self.cluster is None:
            text_BT = getattr(self.windows, split)[list(windows)].to(self.device)
            return evaluate_windows(self.model, text_BT, dense_hidden_BTD, label, progress, prefix)
        answers = self.cluster.share(
            "losses", len(windows), split, list(windows), dense_hidden_BTD, dense_hidden_BTD is None
        )(count_up(progress, label, len(windows)))
        nll, kl = ([value for answer in answers for value in answer[i]] for i in (0, 1))
        hidden = [answer[2] for answer in answers if answer[2] is not None]
        return Evaluation(nll=nll, kl=kl), torch.cat(hidden) if hidden else torch.empty(0)

    def ask(self, checkpoint: str, split: Split, progress: Progress, label: str = "") -> Recall:
        """What a checkpoint knows of the questions of a split; asked once, then read back.

        Raises KeyError in a run that has no questions.
        """
        path = self.directory / "evaluations" / f"questions-{split}-{checkpoint[:16]}.json"
        if path.is_file():
            try:
                return Recall.model_validate_json(path.read_bytes())
            except ValueError:
                self.warn(f"{path} is damaged; the questions are asked again")
        self.restore(checkpoint)
        pairs = self.questions[split]
        if self.cluster is None:
            recall = measure_recall(self.model, pairs, label or "questions", progress)
        else:
            batches = len(cut_batches(pairs))
            ticks = count_up(progress, label or "questions", batches)
            answers = self.cluster.share("recall", batches, split)(ticks)
            recall = put_together(pairs, [value for answer in answers for value in answer])
        write_json(path, recall.model_dump())
        return recall

    def evaluate_other(self, model: Any, profile: str, progress: Progress) -> Evaluation:
        """Losses on the validation text of another model of the same tokens, such as one cut from the dense one."""
        windows = self.windows.validation.to(self.device)
        hidden = self.store.read_tensors(self.read_profile(profile).hidden)["hidden"]
        return evaluate_windows(model, windows, hidden, "validation", progress)[0]

    def probe(
        self,
        profile: str,
        orders: Sequence[WorkOrder],
        windows: int,
        progress: Progress,
        *,
        back: str,
        keep: Sequence[str] = (),
    ) -> list[Evaluation]:
        """Prune by each order as `prune` would, measure it on the first `windows` windows of the validation text, and
        put the weights of the checkpoint `back` back, bit for bit.

        As many are measured at once as can be; each once, then read back. Layers on disk that neither `back`, the
        checkpoints to `keep` nor the last ones measured have are deleted, so that many probes take no more room than
        those that are measured at once.
        """
        keys = [
            ["probe", profile, _only_recipe(order).model_dump_json(), json.dumps(order.zeros), str(windows)]
            for order in orders
        ]
        found = [self._read_measured(key) for key in keys]
        missing = [number for number, known in enumerate(found) if known is None]
        for first in range(0, len(missing), self.abreast):
            numbers = missing[first : first + self.abreast]
            try:
                checkpoints = [self.prune(profile, orders[number], progress) for number in numbers]
                evaluations = self.evaluate_each(checkpoints, windows, profile, progress, "probe")
                self.forget_checkpoints([back, *keep, *checkpoints])
            finally:
                self.restore(back)
            for number, evaluation in zip(numbers, evaluations, strict=True):
                found[number] = self._keep_measured(keys[number], evaluation.model_dump())
        return [Evaluation.model_validate(value) for value in found]

    def mark_blocks(self, weights: Mapping[str, str]) -> list[str]:
        """For each block, a hash that names the weights of all blocks before it; `weights` is each layer's artifact."""
        digest, marks = hashlib.sha256(), []
        for members in self._layers_by_block():
            marks.append(digest.hexdigest())
            for layer in members:
                digest.update(f"{layer.name} {weights[layer.name]}\n".encode())
        return marks

    def _evaluation_path(self, checkpoint: str, split: str) -> Path:
        return self.directory / "evaluations" / f"{split}-{checkpoint[:16]}.json"

    def sparsities(self) -> list[float]:
        """Share of zeros in each layer of the model as it is now, in layer order."""
        return [float((layer.weight_OI == 0).float().mean()) for layer in self.layers]

    def count_zeros(self) -> tuple[int, int]:
        """(zeros, weights) over all prunable layers of the model as it is now."""
        zeros = sum(int((layer.weight_OI == 0).sum()) for layer in self.layers)
        return zeros, sum(layer.weight_OI.numel() for layer in self.layers)

    def hash_masks(self) -> str:
        """SHA-256 over the sorted layer names and their mask bits.

        For each name in sorted order: the name in UTF-8, then one bit per weight as the model's file stores it
        (row-major, lowest bit first, 1 = not zero), padded to whole bytes.
        """
        digest = hashlib.sha256()
        for name in sorted(self.by_name):
            digest.update(name.encode())
            digest.update(pack_bits(self.by_name[name].stored_weight != 0).numpy().tobytes())
        return digest.hexdigest()

    def peak_memory_bytes(self) -> int:
        """The most memory used so far: of all GPUs that the model is on, else of this process."""
        if self.device.type == "cuda":
            devices = {parameter.device for parameter in self.model.parameters()}
            return sum(int(torch.cuda.max_memory_allocated(device)) for device in devices)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _encode_questions(settings: WorkbenchSettings, tokenizer: Any) -> dict[Split, list[EncodedPair]]:
    """The questions of each split; empty where none are asked."""
    if not settings.questions:
        return {}
    parts = split_questions(settings.questions, settings.question_pairs)
    return {"validation": encode_pairs(parts.validation, tokenizer), "test": encode_pairs(parts.test, tokenizer)}


def _refuse_infinite(statistics: ModelStatistics, dtype: str) -> None:
    for values in (statistics.mean_square, statistics.gradient_square):
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"activations or gradients of {name} are not finite in {dtype}; try --dtype fp32 or bf16"
                )


def _only_recipe(order: WorkOrder) -> Recipe:
    """The recipe of all layers. Raises ImpossiblePlan where there are several."""
    recipes = {layer.recipe for layer in order.layers.values()}
    if len(recipes) != 1:
        raise ImpossiblePlan("layers of one round have one recipe")
    return recipes.pop()


def _profile_key(recipe: Recipe) -> list[str]:
    return ["profile", recipe.calibration]


def _plain(recipe: Recipe) -> Recipe:
    """The recipe whose KL curves it reads: always the dense model's, whose levels are the steps of the method refit."""
    return recipe.model_copy(update={"statistics": "dense", "refit_steps": REFIT_STEPS})


def _kappa_key(profile: str, plain: Recipe) -> list[str]:
    return ["kappa", profile, plain.mask_label]


def _hash_key(key: list[str]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _layer_key(profile: str, name: str, zeros: int, recipe: Recipe, below: Sequence[str] = ()) -> str:
    """What a layer's weights depend on; `below` are the artifacts of the layers that its inputs passed through."""
    parts = [profile, name, zeros, recipe.mask_label, recipe.pattern, *below]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


_lock = threading.RLock()
_open: list[Workbench] = []


@contextmanager
def use_workbench(settings: WorkbenchSettings, directory: Path, warn: Warn, progress: Progress) -> Iterator[Workbench]:
    """The workbench of a run directory, opened if need be, for one user at a time in this process.

    Only one model is held: opening another run's workbench closes the last. Raises UserError when the directory is
    in use by another process.
    """
    settings = TeamSettings.model_validate(settings.model_dump(include=set(TeamSettings.model_fields)))
    directory = directory.resolve()
    with _lock:
        if _open and (_open[0].directory != directory or _open[0].settings != settings):
            close_workbench()
        if not _open:
            lock_run(directory)
            _open.append(Workbench(settings, directory, warn, progress))
        _open[0].warn = warn
        yield _open[0]


def close_workbench() -> None:
    """Let go of the loaded model and of its run directory."""
    with _lock:
        while _open:
            bench = _open.pop()
            bench.close()
            unlock_run(bench.directory)
        gc.collect()
