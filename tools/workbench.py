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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from kernels.methods import LayerStatistics, prune_levels, prune_weight
from kernels.packing import pack_mask, pack_weight, unpack_mask, unpack_weight
from kernels.preconditioner import DAMPING
from tools.allocate import Allocation
from tools.baselines import measure_alpha
from tools.blocks import Blocks
from tools.curves import LEVELS, LayerProfile
from tools.errors import DamagedArtifact, UserError
from tools.estimate import PREFIX_SHARE, list_disk
from tools.facts import EncodedPair, Recall, encode_pairs, measure_recall
from tools.files import ArtifactStore, explain_full_disk, write_json
from tools.layers import find_layers, find_unprunable
from tools.losses import Evaluation, PrefixCache, evaluate_windows
from tools.profile import (
    ModelStatistics,
    Moments,
    Progress,
    build_profile,
    collect_moments,
    collect_statistics,
    embed_windows,
    layers_by_block,
    measure_kappa,
    run_block,
)
from tools.questions import split_questions
from tools.readout import check_readout
from tools.recipes import REFIT_STEPS, Recipe, count_pattern_zeros
from tools.rundir import lock_run, unlock_run
from tools.settings import Split, WorkbenchSettings
from tools.sources import load_model
from tools.texts import cut_windows

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


class Workbench:
    """Owns one loaded model. Raises UserError when model or texts cannot be had."""

    def __init__(self, settings: WorkbenchSettings, directory: Path, warn: Warn, progress: Progress) -> None:
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
        limit = int(PREFIX_SHARE * sum(p.nbytes for p in self.model.parameters()))
        self._prefix = PrefixCache(Blocks(self.model), self.windows.validation, limit)
        progress("load model", 1, 1)

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
        activations and gradients are theirs, while scores and curves stay about the dense weights, which all
        pruning starts from.
        """
        if not first:
            self.restore(DENSE)
        hidden, evaluation = self._dense_losses(first, progress)
        windows = self.windows.calibration.to(self.device)
        count = min(self.settings.gradient_windows, len(windows))
        moments: dict[str, str] = {}

        def keep_moment(name: str, moment_II: Tensor) -> None:
            moments[name] = self.store.write_tensors({"A": moment_II})

        keep = None if masks_only and not first else keep_moment
        statistics = collect_statistics(
            self.model, self.layers, windows, count, self.settings.seed, progress, keep, self.directory, self.dense
        )
        _refuse_infinite(statistics, self.settings.dtype)
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
        )
        return self.store.write_json(stored.model_dump())

    def _dense_losses(self, first: str, progress: Progress) -> tuple[str, Evaluation]:
        """(artifact of the dense model's hidden states, its losses) on the validation text."""
        if first:
            stored = self.read_profile(first)
            return stored.hidden, stored.dense
        windows = self.windows.validation.to(self.device)
        evaluation, hidden = evaluate_windows(self.model, windows, None, "dense validation", progress)
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
        gamma_O = means[f"{recipe.gamma}/{name}"].to(self.device)
        if present is not None:
            leader = present.group[name]
            moment_II = present.second_moment[leader]
            return LayerStatistics(moment_II.diagonal(), gamma_O, moment_II)
        if not recipe.changes_survivors:
            return LayerStatistics(means[f"a/{name}"].to(self.device), gamma_O)
        digest = self._find_moments(profile)[stored.group[name]]
        if self._shared is None or self._shared[0] != digest:  # neighbours share one; only one is held
            moment_II = self.store.read_tensors(digest)["A"].to(self.device)
            statistics = LayerStatistics(means[f"a/{name}"].to(self.device), gamma_O, moment_II)
        else:
            statistics = self._shared[1].for_outputs(gamma_O)
        self._shared = (digest, statistics)
        return statistics

    def _find_moments(self, profile: str, progress: Progress = lambda *_: None) -> dict[str, str]:
        """Artifact of each second moment; where the profile was made for masks alone, measured in the dense model."""
        stored = self.read_profile(profile)
        return stored.moments or self._measure_once(["moments", profile], lambda: self._measure_moments(progress))

    def _measure_moments(self, progress: Progress) -> dict[str, str]:
        self.restore(DENSE)
        walk = _TextWalk(self._prefix.blocks, self.windows.calibration.to(self.device))
        artifacts: dict[str, str] = {}
        for block, layers in enumerate(layers_by_block(self.layers, len(walk.blocks))):
            progress("second moments", block, len(walk.blocks))
            moments, walk.states = collect_moments(walk.blocks, block, layers, walk.windows_BT, walk.states)
            artifacts |= {
                name: self.store.write_tensors({"A": moment_II}) for name, moment_II in moments.second_moment.items()
            }
        progress("second moments", len(walk.blocks), len(walk.blocks))
        return artifacts

    def describe_layers(self, profile: str, recipe: Recipe, progress: Progress) -> list[LayerProfile]:
        """The profile's layers, with what the recipe's allocation needs beyond it: measured once, then read back."""
        layers = self.read_profile(profile).layers
        if recipe.allocation == "alphapruning" and not recipe.pattern:
            alpha = self._measure_once(["alpha"], lambda: self._measure_alphas(progress))
            return [layer.model_copy(update={"alpha": alpha[layer.name]}) for layer in layers]
        if recipe.needs_curves:
            # Curves are always the dense model's, and their levels are the steps of the method refit.
            plain = recipe.model_copy(update={"statistics": "dense", "refit_steps": REFIT_STEPS})
            key = ["kappa", profile, plain.mask_label]
            kappa = self._measure_once(key, lambda: self._measure_kappa(profile, plain, progress))
            return [layer.model_copy(update={"kappa": kappa[layer.name]}) for layer in layers]
        return layers

    def read_layers(self, profile: str, recipe: Recipe, progress: Progress) -> list[LayerProfile]:
        """As `describe_layers`, with the profile's KL curves whatever the recipe's: no weight is touched."""
        return self.describe_layers(profile, recipe.model_copy(update={"curves": "mask"}), progress)

    def _measure_once(self, key: list[str], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this key, from disk if it is there and whole."""
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        artifact = self._read_index(".json").get(digest, "")
        if artifact and self.store.has(artifact, ".json"):
            return dict(self.store.read_json(artifact))
        value = measure()
        self._append_index(digest, self.store.write_json(value))
        return value

    def _measure_alphas(self, progress: Progress) -> dict[str, float | None]:
        alphas = {}
        for i, (name, dense_OI) in enumerate(self.dense.items()):
            progress("spectra", i, len(self.dense))
            alphas[name] = measure_alpha(dense_OI.to(self.device))
        progress("spectra", len(self.dense), len(self.dense))
        return alphas

    def _measure_kappa(self, profile: str, recipe: Recipe, progress: Progress) -> dict[str, list[float]]:
        """KL curves of what the recipe's method leaves of each layer."""
        done = 0

        def parts_of(name: str) -> Iterator[Tensor]:
            nonlocal done
            progress(f"KL curves of {recipe.mask_label}", done, len(self.layers))
            done += 1
            dense_OI = self.dense[name].to(self.device)
            zeros = [round(level * dense_OI.numel()) for level in LEVELS]
            statistics = self._statistics_of(profile, name, recipe)
            before_OI = dense_OI
            for pruned_OI in prune_levels(recipe.method, dense_OI, statistics, zeros, refit=recipe.refits_after):
                yield before_OI.float() - pruned_OI.float()
                before_OI = pruned_OI

        if recipe.changes_survivors:
            self._find_moments(profile, progress)
        self.restore(DENSE)
        windows = self.windows.calibration[: self.settings.gradient_windows].to(self.device)
        kappa = measure_kappa(self.model, self.layers, windows, self.settings.seed, progress, parts_of, self.directory)
        progress(f"KL curves of {recipe.mask_label}", len(self.layers), len(self.layers))
        return kappa

    # --- prune and restore -------------------------------------------------------------------------------------

    def prune(self, profile: str, allocation: Allocation, recipe: Recipe, progress: Progress) -> str:
        """Prune every layer from its dense weights to its number of zeros; the id of the checkpoint.

        Layers whose number of zeros and recipe were made before are read back instead of computed.
        """
        recipe = recipe.within_layers()
        if recipe.statistics == "sequential":
            records = self._prune_in_order(profile, allocation.zeros, recipe, progress)
        else:
            if recipe.changes_survivors:
                self._find_moments(profile, progress)  # before any layer is pruned: it may run the dense model
            records = {}
            index = self._read_index()
            for i, (name, zeros) in enumerate(allocation.zeros.items()):
                progress("prune", i, len(allocation.zeros))
                key = _layer_key(profile, name, zeros, recipe)
                artifact = self._install_known(name, zeros, recipe, index.get(key, ""))
                if not artifact:
                    artifact = self._compute(name, zeros, recipe, self._statistics_of(profile, name, recipe))
                    self._append_index(key, artifact)
                records[name] = LayerRecord(artifact=artifact, zeros=zeros)
            progress("prune", len(records), len(records))
        return self.store.write_json(Checkpoint(profile=profile, recipe=recipe, layers=records).model_dump())

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
        walk = _TextWalk(self._prefix.blocks, self.windows.calibration.to(self.device))
        index = self._read_index()
        records: dict[str, LayerRecord] = {}
        for block, layers in enumerate(layers_by_block(self.layers, len(walk.blocks))):
            progress("prune in order", block, len(walk.blocks))
            below = [record.artifact for record in records.values()]
            keys = {x.name: _layer_key(profile, x.name, zeros[x.name], recipe, below) for x in layers}
            made = {n: self._install_known(n, zeros[n], recipe, index.get(key, "")) for n, key in keys.items()}
            if not all(made.values()):
                walk.move_to(block)
                for layer in layers:
                    self._install(layer.name, DENSE)
                moments, _ = collect_moments(walk.blocks, block, layers, walk.windows_BT, walk.states)
                for name, artifact in made.items():
                    if not artifact:
                        statistics = self._statistics_of(profile, name, recipe, moments)
                        made[name] = self._compute(name, zeros[name], recipe, statistics)
                        self._append_index(keys[name], made[name])
                    self._install(name, made[name])
            records |= {name: LayerRecord(artifact=artifact, zeros=zeros[name]) for name, artifact in made.items()}
        progress("prune in order", len(walk.blocks), len(walk.blocks))
        return records

    def _compute(self, name: str, zeros: int, recipe: Recipe, statistics: LayerStatistics) -> str:
        """Prune one layer, put it into the model and on disk; its artifact."""
        dense_OI = self.dense[name].to(self.device)
        pruned = prune_weight(
            recipe.method,
            dense_OI,
            statistics,
            zeros,
            refit=recipe.refits_after,
            refit_steps=recipe.steps,
            pattern=recipe.group,
        )
        pruned_OI = pruned.weight_OI
        if pruned.damping > DAMPING:
            self.warn(f"layer {name} needed damping {pruned.damping:g} instead of {DAMPING:g}: its inputs are singular")
        if recipe.changes_survivors:
            bits, values = pack_weight(pruned_OI)
            tensors = {"mask": bits, "values": values}
        else:  # the survivors are the dense weights: the mask says everything
            tensors = {"mask": pack_mask(pruned_OI != 0)}
        artifact = self.store.write_tensors(tensors)
        self._write(name, pruned_OI, artifact)
        return artifact

    def _write(self, name: str, weight_OI: Tensor, artifact: str) -> None:
        self.installed[name] = ""  # a write that is cut short leaves neither the old weights nor the new
        self.by_name[name].write(weight_OI)
        self.installed[name] = artifact

    def _install(self, name: str, artifact: str) -> bool:
        """Put a layer's stored weights into the model; False (and a warning) when the artifact is damaged."""
        if self.installed[name] == artifact:
            return True
        dense_OI = self.dense[name]
        if artifact == DENSE:
            weight_OI = dense_OI
        else:
            try:
                tensors = self.store.read_tensors(artifact)
            except DamagedArtifact as error:
                self.warn(f"{error}; layer {name} is computed again")
                self.store.path(artifact, ".safetensors").unlink(missing_ok=True)  # nobody should trip over it again
                return False
            shape = (dense_OI.shape[0], dense_OI.shape[1])
            if "values" in tensors:
                weight_OI = unpack_weight(tensors["mask"], tensors["values"], shape)
            else:
                weight_OI = torch.where(unpack_mask(tensors["mask"], shape), dense_OI, 0)
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
                if self._make_again(manifest, name) != record.artifact:
                    raise DamagedArtifact(
                        f"layer {name} of checkpoint {checkpoint[:12]} is damaged and does not come out the same again"
                    )
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

    def is_made_of(self, checkpoint: str, profile: str, allocation: Allocation, recipe: Recipe) -> bool:
        """Whether a checkpoint is what `prune` makes of these. Raises DamagedArtifact without a whole manifest."""
        if checkpoint == DENSE:
            return False
        manifest = self._read_manifest(checkpoint)
        zeros = {name: record.zeros for name, record in manifest.layers.items()}
        return (manifest.profile, manifest.recipe, zeros) == (profile, recipe.within_layers(), allocation.zeros)

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
        path = self._evaluation_path(checkpoint, split)
        if path.is_file():
            try:
                return Evaluation.model_validate_json(path.read_bytes())
            except ValueError:
                self.warn(f"{path} is damaged; {split} is measured again")
        self.restore(checkpoint)
        windows, hidden, prefix = getattr(self.windows, split).to(self.device), None, None
        if split == "validation":
            hidden = self.store.read_tensors(self.read_profile(profile).hidden)["hidden"]
            prefix = self._prefix, self._mark_blocks()
        evaluation, _ = evaluate_windows(self.model, windows, hidden, label or split, progress, prefix)
        write_json(path, evaluation.model_dump())
        return evaluation

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
        recall = measure_recall(self.model, self.questions[split], label or "questions", progress)
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
        allocation: Allocation,
        recipe: Recipe,
        windows: int,
        progress: Progress,
        *,
        back: str,
        keep: Sequence[str] = (),
    ) -> Evaluation:
        """Prune as `prune` would, measure on the first `windows` windows of the validation text, and put the weights
        of the checkpoint `back` back, bit for bit.

        Measured once, then read back. Layers on disk that neither `back`, the checkpoints to `keep` nor this probe
        have are deleted, so that many probes take no more room than one.
        """

        def measure() -> dict[str, Any]:
            try:
                checkpoint = self.prune(profile, allocation, recipe, progress)
                evaluation = self._evaluate_first(windows, checkpoint, profile, progress)
                self.forget_checkpoints([back, *keep, checkpoint])
            finally:
                self.restore(back)
            return evaluation.model_dump()

        key = ["probe", profile, recipe.within_layers().model_dump_json(), json.dumps(allocation.zeros), str(windows)]
        return Evaluation.model_validate(self._measure_once(key, measure))

    def _evaluate_first(self, windows: int, checkpoint: str, profile: str, progress: Progress) -> Evaluation:
        """Losses of the checkpoint in the model on the first windows of the validation text."""
        if windows == len(self.windows.validation):
            return self.evaluate(checkpoint, "validation", profile, progress, "probe")
        text = self.windows.validation[:windows].to(self.device)
        hidden = self.store.read_tensors(self.read_profile(profile).hidden)["hidden"][:windows]
        return evaluate_windows(self.model, text, hidden, "probe", progress)[0]

    def measure_kl(self, windows: Sequence[int]) -> float:
        """KL(dense || the weights in the model now) on some windows of the calibration text; inf if not finite."""
        text = self.windows.calibration
        if self._calibration_hidden is None:
            present = dict(self.installed)
            self.restore(DENSE)
            count = self.settings.gradient_windows
            _, hidden = evaluate_windows(self.model, text[:count].to(self.device), None, "", lambda *_: None)
            self._calibration_hidden = hidden
            for name, artifact in present.items():
                self._install(name, artifact)
        chosen = list(windows)
        hidden = self._calibration_hidden[chosen]
        evaluation, _ = evaluate_windows(self.model, text[chosen].to(self.device), hidden, "", lambda *_: None)
        return math.inf if evaluation.mean_kl is None else evaluation.mean_kl

    def _mark_blocks(self) -> list[str]:
        """For each block, a hash of the weights of all blocks before it."""
        digest, marks = hashlib.sha256(), []
        for members in layers_by_block(self.layers, len(self._prefix.blocks)):
            marks.append(digest.hexdigest())
            for layer in members:
                digest.update(f"{layer.name} {self.installed[layer.name]}\n".encode())
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
            digest.update(pack_mask(self.by_name[name].stored_weight != 0).numpy().tobytes())
        return digest.hexdigest()

    def peak_memory_bytes(self) -> int:
        """The most memory used so far: of the GPU where the model is on one, else of this process."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
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


class _TextWalk:
    """The calibration text on its way up through blocks that are pruned one after another."""

    def __init__(self, blocks: Blocks, windows_BT: Tensor) -> None:
        self.blocks, self.windows_BT = blocks, windows_BT
        self.states = embed_windows(blocks, windows_BT)
        self._block = 0

    def move_to(self, block: int) -> None:
        """Make `states` what this block reads, by way of the blocks below as they are now."""
        while self._block < block:
            self.states = run_block(self.blocks, self._block, self.windows_BT, self.states)
            self._block += 1


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
    settings = WorkbenchSettings.model_validate(settings.model_dump(include=set(WorkbenchSettings.model_fields)))
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
            unlock_run(_open.pop().directory)
        gc.collect()
