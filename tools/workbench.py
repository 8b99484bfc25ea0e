"""The one loaded model of a run: its layers, splits, statistics, and the weights that are in it now.

Everything it makes goes to disk under the hash of its content, so a killed run goes on where it was.
"""

import gc
import hashlib
import json
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from kernels.methods import MASK_ONLY, LayerStatistics, prune_weight
from kernels.packing import pack_mask, pack_weight, unpack_mask, unpack_weight
from tools.allocate import Allocation
from tools.curves import LayerProfile
from tools.errors import DamagedArtifact, UserError
from tools.evaluate import Evaluation, evaluate_windows
from tools.files import ArtifactStore, explain_full_disk, write_json
from tools.layers import find_layers, find_unprunable
from tools.profile import ModelStatistics, Progress, build_profile, collect_statistics, measure_kappa
from tools.readout import check_readout
from tools.recipes import Recipe
from tools.rundir import lock_run, unlock_run
from tools.settings import WorkbenchSettings
from tools.sources import load_model
from tools.texts import cut_windows

DENSE = "dense"
"""Id of the unpruned weights, as a checkpoint and as a layer's artifact."""

Warn = Callable[[str], None]


class LayerRecord(BaseModel):
    """One layer of a checkpoint: where its weights lie, and how they were made, to make them again."""

    artifact: str
    zeros: int
    method: str
    refit: bool


class StoredProfile(BaseModel):
    """What `Workbench.profile` leaves on disk."""

    layers: list[LayerProfile]
    means: str
    moments: dict[str, str]
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
        check_readout(self.model, self.windows.calibration[0].to(self.device))
        self.dense = {layer.name: layer.weight_OI.to("cpu", copy=True).contiguous() for layer in self.layers}
        self.installed = dict.fromkeys(self.by_name, DENSE)
        self._profile: tuple[str, StoredProfile, dict[str, Tensor]] | None = None
        self._moment: tuple[str, Tensor] | None = None
        progress("load model", 1, 1)

    def _refuse_small_disk(self) -> None:
        """Moments, three checkpoints and the exported model must fit."""
        weights = sum(layer.weight_OI.nbytes for layer in self.layers)
        moments = sum(4 * layer.weight_OI.shape[1] ** 2 for layer in self.layers)
        needed = moments + 3 * weights + sum(p.nbytes for p in self.model.parameters())
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                f"the disk is full: a run of this model may write {needed / 1e9:.1f} GB to {self.directory}, "
                f"but {free / 1e9:.1f} GB are free; free some, or use another --runs-dir"
            )

    # --- profile -----------------------------------------------------------------------------------------------

    def profile(self, progress: Progress, first: str = "") -> str:
        """Statistics, KL curves and the dense model's losses, kept as artifacts; the id of the profile.

        The first profile is that of the dense model. Given its id, another is made of the weights in the model now:
        activations and gradients are theirs, while scores and curves stay about the dense weights, which all
        pruning starts from.
        """
        if not first:
            self.restore(DENSE)
        hidden, evaluation = self._dense_losses(first, progress)
        windows = self.windows.calibration.to(self.device)
        count = min(self.settings.gradient_windows, len(windows))
        statistics = collect_statistics(self.model, self.layers, windows, count, self.settings.seed, progress)
        _refuse_infinite(statistics, self.settings.dtype)
        kappa = measure_kappa(
            self.model, self.layers, statistics, windows[:count], self.settings.seed, progress, self.dense
        )
        means = {f"a/{name}": value for name, value in statistics.mean_square.items()}
        means |= {f"gamma/{name}": value for name, value in statistics.gradient_square.items()}
        stored = StoredProfile(
            layers=build_profile(self.layers, statistics, kappa, self.dense),
            means=self.store.write_tensors(means),
            moments={name: self.store.write_tensors({"A": a}) for name, a in statistics.second_moment.items()},
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

    def _statistics_of(self, profile: str, name: str, with_moment: bool) -> LayerStatistics:
        stored = self.read_profile(profile)
        assert self._profile is not None
        means = self._profile[2]
        moment = None
        if with_moment:
            digest = stored.moments[stored.group[name]]
            if self._moment is None or self._moment[0] != digest:  # neighbours share one; only one is held
                self._moment = (digest, self.store.read_tensors(digest)["A"].to(self.device))
            moment = self._moment[1]
        return LayerStatistics(means[f"a/{name}"].to(self.device), means[f"gamma/{name}"].to(self.device), moment)

    # --- prune and restore -------------------------------------------------------------------------------------

    def prune(self, profile: str, allocation: Allocation, recipe: Recipe, progress: Progress) -> str:
        """Prune every layer from its dense weights to its number of zeros; the id of the checkpoint.

        Layers whose number of zeros and recipe were made before are read back instead of computed.
        """
        index = self._read_index()
        records: dict[str, LayerRecord] = {}
        natural = {layer.name: layer.zeros for layer in self.read_profile(profile).layers}
        for i, (name, zeros) in enumerate(allocation.zeros.items()):
            progress("prune", i, len(allocation.zeros))
            record = LayerRecord(artifact=DENSE, zeros=zeros, method=recipe.method, refit=recipe.refits_after)
            if zeros > natural[name]:
                key = _recipe_key(profile, name, record)
                record.artifact = index.get(key, "")
                if not (record.artifact and self._install(name, record.artifact)):
                    record.artifact = self._compute(profile, name, record)
                    self._append_index(key, record.artifact)
            else:
                self._install(name, DENSE)
            records[name] = record
        progress("prune", len(records), len(records))
        manifest = {"profile": profile, "layers": {name: record.model_dump() for name, record in records.items()}}
        return self.store.write_json(manifest)

    def _compute(self, profile: str, name: str, record: LayerRecord) -> str:
        """Prune one layer, put it into the model and on disk; its artifact."""
        changes = record.refit or record.method not in MASK_ONLY
        statistics = self._statistics_of(profile, name, changes)
        dense_OI = self.dense[name].to(self.device)
        pruned_OI = prune_weight(record.method, dense_OI, statistics, record.zeros, refit=record.refit)
        if changes:
            bits, values = pack_weight(pruned_OI)
            tensors = {"mask": bits, "values": values}
        else:  # the survivors are the dense weights: the mask says everything
            tensors = {"mask": pack_mask(pruned_OI != 0)}
        artifact = self.store.write_tensors(tensors)
        self.by_name[name].write(pruned_OI)
        self.installed[name] = artifact
        return artifact

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
                return False
            shape = (dense_OI.shape[0], dense_OI.shape[1])
            if "values" in tensors:
                weight_OI = unpack_weight(tensors["mask"], tensors["values"], shape)
            else:
                weight_OI = torch.where(unpack_mask(tensors["mask"], shape), dense_OI, 0)
        self.by_name[name].write(weight_OI)
        self.installed[name] = artifact
        return True

    def restore(self, checkpoint: str) -> list[str]:
        """Put a checkpoint's weights back bit for bit; the names of the layers that differed.

        A damaged artifact is computed again and must come out with the same hash; otherwise DamagedArtifact.
        """
        changed = []
        for name, record in self.read_checkpoint(checkpoint).items():
            if self.installed[name] == record.artifact:
                continue
            changed.append(name)
            if not self._install(name, record.artifact):
                made = self._compute(self.read_manifest_profile(checkpoint), name, record)
                if made != record.artifact:
                    raise DamagedArtifact(
                        f"layer {name} of checkpoint {checkpoint[:12]} is damaged and does not come out the same again"
                    )
        return changed

    def read_checkpoint(self, checkpoint: str) -> dict[str, LayerRecord]:
        """The layers of a checkpoint. Raises DamagedArtifact when its manifest is not whole."""
        if checkpoint == DENSE:
            return {n: LayerRecord(artifact=DENSE, zeros=0, method=DENSE, refit=False) for n in self.by_name}
        layers = self.store.read_json(checkpoint)["layers"]
        return {name: LayerRecord.model_validate(record) for name, record in layers.items()}

    def planned_sparsity(self, checkpoint: str) -> dict[str, float]:
        """Layer name to the share of zeros that the checkpoint was made for; 0 everywhere for the dense weights."""
        return {name: r.zeros / self.dense[name].numel() for name, r in self.read_checkpoint(checkpoint).items()}

    def read_manifest_profile(self, checkpoint: str) -> str:
        """The profile that a checkpoint was made from."""
        return str(self.store.read_json(checkpoint)["profile"])

    def forget_checkpoints(self, keep: list[str]) -> None:
        """Delete the layer artifacts that none of the checkpoints to keep refers to; their recipes stay known."""
        kept = {record.artifact for checkpoint in keep for record in self.read_checkpoint(checkpoint).values()}
        for artifact in set(self._read_index().values()) - kept:
            self.store.path(artifact, ".safetensors").unlink(missing_ok=True)

    def _read_index(self) -> dict[str, str]:
        """What was made before, by recipe; a line torn by a kill is ignored, files that are gone are left out."""
        known: dict[str, str] = {}
        path = self.store.directory / "index.jsonl"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    known[entry["key"]] = entry["artifact"]
                except (ValueError, KeyError, TypeError):
                    continue
        return {k: a for k, a in known.items() if self.store.path(a, ".safetensors").is_file()}

    def _append_index(self, key: str, artifact: str) -> None:
        path = self.store.directory / "index.jsonl"
        with explain_full_disk(path), path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": key, "artifact": artifact}))  # a torn line never swallows the next

    # --- measure -----------------------------------------------------------------------------------------------

    def evaluate(self, checkpoint: str, split: str, profile: str, progress: Progress, label: str = "") -> Evaluation:
        """Losses of a checkpoint on a split (`validation` or `test`); measured once, then read back."""
        path = self._evaluation_path(checkpoint, split)
        if path.is_file():
            try:
                return Evaluation.model_validate_json(path.read_bytes())
            except ValueError:
                self.warn(f"{path} is damaged; {split} is measured again")
        self.restore(checkpoint)
        hidden = self.store.read_tensors(self.read_profile(profile).hidden)["hidden"] if split == "validation" else None
        windows = getattr(self.windows, split).to(self.device)
        evaluation, _ = evaluate_windows(self.model, windows, hidden, label or split, progress)
        write_json(path, evaluation.model_dump())
        return evaluation

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


def _refuse_infinite(statistics: ModelStatistics, dtype: str) -> None:
    for values in (statistics.mean_square, statistics.gradient_square):
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"activations or gradients of {name} are not finite in {dtype}; try --dtype fp32 or bf16"
                )


def _recipe_key(profile: str, name: str, record: LayerRecord) -> str:
    return hashlib.sha256(json.dumps([profile, name, record.zeros, record.method, record.refit]).encode()).hexdigest()


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
