"""Layers pruned by what is known of them, each from its dense weights: put into the model, and on disk."""

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import NamedTuple

from pydantic import BaseModel
from torch import Tensor

from billhook_kernels.guard import DAMPING
from tools.base.errors import explain_layer
from tools.base.progress import Progress, Warn, heed_stop
from tools.models.artifacts import FORMAT, pack_pruned, unpack_pruned
from tools.plans.cuts import CutOrder
from tools.plans.pattern import count_pattern_zeros
from tools.plans.recipe import Recipe
from tools.statistics.collect import Moments, collect_moments
from tools.statistics.passage import Walk
from tools.statistics.requests import begin_walk
from tools.statistics.table import prune_layer
from tools.team.cluster import Cluster
from tools.team.requests import PruneLayers
from tools.workbench.losses import Crew
from tools.workbench.profiles import Profiles
from tools.workbench.store import DENSE, ArtifactStore, Index
from tools.workbench.weights import Weights


class LayerTask(NamedTuple):
    """What is to become of one layer, and by which statistics."""

    zeros: int
    recipe: Recipe
    """`Recipe.within_layers`."""
    profile: str


class LayerRecord(BaseModel):
    """One layer of a checkpoint: where its weights lie, and how many of them were to go."""

    artifact: str
    zeros: int
    recipe: Recipe | None = None
    """Left out where it is the checkpoint's."""
    profile: str | None = None
    """The same."""


class Checkpoint(BaseModel):
    """A manifest: the weights of all layers, and how they were made, to make them again."""

    profile: str
    recipe: Recipe
    """What most layers were made by."""
    layers: dict[str, LayerRecord]
    polish: int | None = None
    """Tokens that all layers together were polished on afterwards; left out where they were not."""
    cut: CutOrder | None = None
    """The parts that went; left out where weights were pruned one by one."""
    units: str | None = None
    """Artifact of the units that stay, where parts went."""

    @property
    def tasks(self) -> dict[str, LayerTask]:
        """What every layer was made by."""
        return {
            name: LayerTask(record.zeros, record.recipe or self.recipe, record.profile or self.profile)
            for name, record in self.layers.items()
        }


def make_checkpoint(tasks: Mapping[str, LayerTask], artifacts: Mapping[str, str], polish: int = 0) -> Checkpoint:
    """The manifest of layers that were made by `tasks`, and polished on so many tokens."""
    shared = Counter((task.recipe, task.profile) for task in tasks.values()).most_common(1)
    recipe, profile = shared[0][0]
    layers = {
        name: LayerRecord(
            artifact=artifacts[name],
            zeros=task.zeros,
            recipe=None if task.recipe == recipe else task.recipe,
            profile=None if task.profile == profile else task.profile,
        )
        for name, task in tasks.items()
    }
    return Checkpoint(profile=profile, recipe=recipe, layers=layers, polish=polish or None)


def make_layer_key(name: str, dense: str, statistics: str, task: LayerTask, below: Sequence[str] = ()) -> str:
    """What a pruned layer's artifact depends on, whatever profile it is pruned for.

    `dense` is the hash of its dense weights, `statistics` the artifact of those it is pruned by, `below` are the
    artifacts of the layers that its inputs passed through.
    """
    parts = [FORMAT, name, dense, statistics, task.zeros, task.recipe.mask_label, task.recipe.pattern, *below]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


Tasks = Mapping[str, LayerTask]
"""By layer name, in the model's order."""

Made = dict[str, str]
"""Artifacts, by layer name."""


class LayerPruner:
    """Prunes layers in this process, or hands them to the crew; what was made before is read back."""

    def __init__(
        self, weights: Weights, profiles: Profiles, store: ArtifactStore, index: Index, crew: Crew, warn: Warn
    ) -> None:
        self._weights, self._profiles, self._store = weights, profiles, store
        self._index, self._crew, self._warn = index, crew, warn

    def prune(self, tasks: Tasks, progress: Progress) -> dict[str, str]:
        """The artifact of every layer, all of which are in the model."""
        dense = {name: task for name, task in tasks.items() if not task.recipe.in_order}
        # Before any layer is pruned: it may run the dense model.
        for profile in sorted({task.profile for task in dense.values() if task.recipe.changes_survivors}):
            self._profiles.find_moments(profile, progress)
        made = self._prune_from_dense(dense, progress) if dense else {}
        return made if len(dense) == len(tasks) else self._prune_in_order(tasks, made, progress)

    def _prune_from_dense(self, tasks: Tasks, progress: Progress) -> dict[str, str]:
        """Every layer by what it reads in the dense model; the artifacts."""
        index = self._index.read()
        keys = self._make_keys(tasks)
        made = {}
        for name, task in tasks.items():
            if artifact := self._install_known(name, task, index.get(keys[name], "")):
                made[name] = artifact
        progress("prune", len(made), len(tasks))
        missing = {name: task for name, task in tasks.items() if name not in made}
        lacking = {name: task for name, task in missing.items() if self.lacks_moments(task)}
        at_once = self._compute_all({name: task for name, task in missing.items() if name not in lacking})
        with closing(self._compute_by_block(lacking, progress)) as by_block:
            for name, artifact in chain(at_once, by_block):
                self._index.add(keys[name], artifact)
                made[name] = artifact
                progress("prune", len(made), len(tasks))
        if lacking:
            for name, artifact in made.items():
                self._weights.install(name, artifact)
        return made

    def lacks_moments(self, task: LayerTask) -> bool:
        """Whether a second moment that the task reads is not kept, so that it is collected anew."""
        return self._profiles.lacks_moments(task.profile, task.recipe)

    def _compute_by_block(self, tasks: Tasks, progress: Progress) -> Generator[tuple[str, str], None, None]:
        """As `_compute_all`, of layers whose second moments are not kept: those of a block once these are collected.

        The text passes the dense model meanwhile, and it is dense that all layers are left.
        """
        by_profile: dict[str, dict[str, LayerTask]] = {}
        for name, task in tasks.items():
            by_profile.setdefault(task.profile, {})[name] = task
        for profile, chosen in by_profile.items():
            with self._profiles.pass_moments(profile, progress) as hold:
                for block, layers in enumerate(self._weights.by_block):
                    if own := {layer.name: chosen[layer.name] for layer in layers if layer.name in chosen}:
                        hold(block)
                        for name, artifact in self._compute_all(own):
                            self._weights.install(name, DENSE)
                            yield name, artifact

    def _make_keys(self, tasks: Tasks, below: Sequence[str] = ()) -> dict[str, str]:
        profiles = dict.fromkeys(task.profile for task in tasks.values())
        statistics = {profile: self._profiles.read(profile).means for profile in profiles}
        return {
            name: make_layer_key(name, self._weights.hash_dense(name), statistics[task.profile], task, below)
            for name, task in tasks.items()
        }

    def _install_known(self, name: str, task: LayerTask, artifact: str) -> str:
        """Put in what is known: the dense weights if no more are to go, else the artifact; "" where there is none."""
        dense_OI, group = self._weights.dense[name], task.recipe.group
        patterned = group is not None and task.zeros == count_pattern_zeros(dense_OI.numel(), group)
        if not patterned and task.zeros <= self._weights.count_dense_zeros(name):
            artifact = DENSE
        return artifact if artifact and self._weights.install(name, artifact) else ""

    def _prune_in_order(self, tasks: Tasks, made: Mapping[str, str], progress: Progress) -> dict[str, str]:
        """Block by block: each is pruned by what it reads in the model whose earlier blocks are pruned already.

        Within a block all layers of sequential statistics are pruned by the inputs that they have while the whole block
        is still dense, as in the loops of Wanda and SparseGPT (`tools.plans.methods.Method.statistics`). The pruned
        block passes on what the next one reads. States between blocks are in the model's number format, sums in fp32,
        as there. Layers that are `made` have their artifacts, and stay as these are; those of all come out.
        """
        grouped, index, done = self._weights.by_block, self._index.read(), dict(made)
        text = self._profiles.read(next(task.profile for name, task in tasks.items() if name not in made))
        with begin_walk(self._crew.team, text.calibration, shares=text.shares) as walk:
            for block, layers in enumerate(grouped):
                progress("prune in order", block, len(grouped))
                below = [done[layer.name] for earlier in grouped[:block] for layer in earlier]
                own = {layer.name: tasks[layer.name] for layer in layers if layer.name not in made}
                keys = self._make_keys(own, below)
                if missing := self._install_made(own, keys, index, done):
                    for layer in layers:
                        self._weights.install(layer.name, DENSE)
                    self._prune_present(walk, block, missing, keys, done)
                for layer in layers:
                    self._weights.install(layer.name, done[layer.name])
        progress("prune in order", len(grouped), len(grouped))
        return done

    def _install_made(self, tasks: Tasks, keys: Mapping[str, str], index: Mapping[str, str], done: Made) -> Tasks:
        """Put in what was made before, which is then `done`; what was not."""
        for name, task in tasks.items():
            if artifact := self._install_known(name, task, index.get(keys[name], "")):
                done[name] = artifact
        return {name: task for name, task in tasks.items() if name not in done}

    def _prune_present(self, walk: Walk, block: int, tasks: Tasks, keys: Mapping[str, str], done: Made) -> None:
        """Prune layers of a block by what they read in the model as it is.

        Each kind of sums is made for itself, so that a layer's are the same, to the bit, whatever the others' are.
        """
        team, extent, layers = self._crew.team, self._crew.extent, self._weights.by_block[block]
        for full in sorted({task.recipe.changes_survivors for task in tasks.values()}):
            chosen = {name: task for name, task in tasks.items() if task.recipe.changes_survivors == full}
            moments = collect_moments(team, extent, walk, block, layers, full=full, purpose="pruning")
            if layers[0].is_streamed:
                moments = moments.bring_near()
            for name, artifact in self._compute_all(chosen, moments):
                self._index.add(keys[name], artifact)
                done[name] = artifact

    def _compute_all(self, tasks: Tasks, present: Moments | None = None) -> Iterator[tuple[str, str]]:
        """Prune layers, by the workers where there are some; (name, artifact) of each when it is in the model."""
        if self._crew.cluster is not None:
            jobs = self._list_jobs(self._crew.cluster, tasks, present)
            for _, results in self._crew.cluster.hand_out(jobs):
                for name, tensors, damping in results:
                    weight_OI = unpack_pruned(tensors, self._weights.dense[name], self._weights.device_of(name))
                    yield name, self._keep(name, weight_OI, tensors, damping)
            return
        for zeros, recipe, profile in _group(tasks):
            for name in zeros:
                heed_stop()
                yield name, self.compute(name, LayerTask(zeros[name], recipe, profile), present)

    def _list_jobs(self, cluster: Cluster, tasks: Tasks, present: Moments | None) -> Iterator[PruneLayers]:
        for zeros, recipe, profile in _group(tasks):
            for group in self._profiles.list_work(cluster, zeros, profile, recipe, present):
                yield PruneLayers(recipe, group)

    def compute(self, name: str, task: LayerTask, present: Moments | None = None) -> str:
        """Prune one layer in this process, put it into the model and on disk; its artifact."""
        with explain_layer(f"pruning layer {name}"):
            statistics = self._profiles.find_statistics(task.profile, name, task.recipe, present)
            dense_OI = self._weights.dense[name].to(self._weights.device_of(name))
            pruned = prune_layer(task.recipe, dense_OI, statistics, task.zeros)
            tensors = pack_pruned(pruned.weight_OI, values=task.recipe.changes_survivors)
        return self._keep(name, pruned.weight_OI, tensors, pruned.damping)

    def _keep(self, name: str, weight_OI: Tensor, tensors: dict[str, Tensor], damping: float) -> str:
        """Put a pruned layer into the model, and on disk as `tensors`, which stand for the same bits; its artifact."""
        if damping > DAMPING:
            self._warn(f"layer {name} needed damping {damping:g} instead of {DAMPING:g}: its inputs are singular")
        artifact = self._store.write_tensors(tensors)
        self._weights.write(name, weight_OI, artifact)
        return artifact


def _group(tasks: Tasks) -> list[tuple[dict[str, int], Recipe, str]]:
    """(zeros by layer, recipe, profile) of all layers that have the last two alike."""
    groups: dict[tuple[Recipe, str], dict[str, int]] = {}
    for name, task in tasks.items():
        groups.setdefault((task.recipe, task.profile), {})[name] = task.zeros
    return [(zeros, recipe, profile) for (recipe, profile), zeros in groups.items()]
