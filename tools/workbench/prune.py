"""Pruning by a work order, from the dense weights, and the checkpoints that come of it."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor

from kernels.damping import DAMPING
from tools.base.errors import DamagedArtifact, ImpossiblePlan
from tools.base.failures import explain_layer
from tools.base.progress import Progress, Warn, heed_stop, ignore_progress
from tools.models.artifacts import hash_as_earlier, pack_pruned, unpack_pruned
from tools.plans.cuts import CutOrder
from tools.plans.groups import refuse_two_walks
from tools.plans.methods import METHODS
from tools.plans.recipe import Recipe, count_pattern_zeros
from tools.plans.work_order import LayerOrder, WorkOrder
from tools.results.schema import Polished
from tools.statistics.collect import Moments, begin_walk, collect_moments, find_stages
from tools.statistics.pruned import prune_layer
from tools.statistics.walk import Walk
from tools.team.cluster import Cluster
from tools.team.requests import PruneLayers
from tools.workbench.checkpoints import (
    Checkpoint,
    LayerRecord,
    LayerTask,
    Taken,
    make_checkpoint,
    make_layer_key,
)
from tools.workbench.crew import Crew
from tools.workbench.cuts import Cuts
from tools.workbench.polish import Polisher, PolishText
from tools.workbench.profiles import Profiles
from tools.workbench.store import DENSE, ArtifactStore, Index
from tools.workbench.weights import Weights

Tasks = Mapping[str, LayerTask]
"""By layer name, in the model's order."""

Made = dict[str, str]
"""Artifacts, by layer name."""


class Pruner:
    """Makes checkpoints, and brings them back."""

    def __init__(
        self,
        weights: Weights,
        profiles: Profiles,
        polisher: Polisher,
        store: ArtifactStore,
        index: Index,
        crew: Crew,
        cuts: Cuts,
        warn: Warn,
    ) -> None:
        self._weights, self._profiles, self._polisher, self._store = weights, profiles, polisher, store
        self._cuts = cuts
        self._index, self._crew, self._warn = index, crew, warn

    # --- prune -------------------------------------------------------------------------------------------------

    def prune(self, profile: str, order: WorkOrder, progress: Progress) -> str:
        """Prune every layer from its dense weights to its number of zeros; the id of the checkpoint.

        Layers whose number of zeros and recipe were made before are read back instead of computed. Those whose recipe
        asks for other than dense statistics are pruned block by block, behind all that is pruned before them, once the
        others have been pruned by what they read in the dense model. An order that asks for it is then polished. Raises
        ImpossiblePlan where a text that a recipe's statistics are to be of is not there, or those behind pruned
        predecessors are to be of several, or too little for a polish, and BrokenPlan for a layer that cannot be pruned
        so: those that were made before it are kept, and the model holds a mixture. Of layers that are taken from other
        checkpoints nothing is pruned.
        """
        if order.grafted:
            return self._graft(order)
        if order.cut:
            return self._cut(profile, order, order.cut, progress)
        recipes = list(dict.fromkeys(layer.recipe for layer in order.layers.values()))
        refuse_two_walks(recipes)
        for recipe in recipes:
            self._profiles.refuse_statistics(recipe)
        found = {recipe: self._profiles.find(profile, recipe, progress) for recipe in recipes}
        tasks = {name: LayerTask(x.zeros, x.recipe, found[x.recipe]) for name, x in order.layers.items()}
        made = self._prune_all(tasks, order.polish, progress)
        checkpoint = make_checkpoint(tasks, made, order.polish)
        return self._store.write_json(checkpoint.model_dump(exclude_none=True))

    def _cut(self, profile: str, order: WorkOrder, cut: CutOrder, progress: Progress) -> str:
        """As `prune`, of parts that go whole."""
        tasks = {name: LayerTask(x.zeros, x.recipe, profile) for name, x in order.layers.items()}
        made, units = self._cuts.make(cut, progress)
        checkpoint = make_checkpoint(tasks, made).model_copy(update={"cut": cut, "units": units})
        return self._store.write_json(checkpoint.model_dump(exclude_none=True))

    def build_cut(self, checkpoint: str) -> tuple[Any, CutOrder] | None:
        """The smaller model of a checkpoint whose parts went, which is put in, and what went; None where none did.

        Raises DamagedArtifact, and UserError as `Cuts.build`.
        """
        manifest = None if checkpoint == DENSE else self._read(checkpoint)
        if manifest is None or manifest.cut is None or manifest.units is None:
            return None
        self.restore(checkpoint)
        return self._cuts.build(manifest.cut, manifest.units), manifest.cut

    def _graft(self, order: WorkOrder) -> str:
        """As `prune`, of layers that other checkpoints hold."""
        made = self._list_taken_tasks(order)
        checkpoint = make_checkpoint({n: task for n, (task, _) in made.items()}, {n: a for n, (_, a) in made.items()})
        grafted = self._store.write_json(checkpoint.model_dump(exclude_none=True))
        self.restore(grafted)
        return grafted

    def _list_taken_tasks(self, order: WorkOrder) -> dict[str, tuple[LayerTask, str]]:
        """Of every layer that is taken what it was made by, and its artifact. Raises DamagedArtifact."""
        sources = {source: self._read(source) for source in dict.fromkeys(x.taken for x in order.layers.values())}
        tasks = {source: checkpoint.tasks for source, checkpoint in sources.items()}
        return {
            name: (tasks[x.taken][name]._replace(taken=x.taken), sources[x.taken].layers[name].artifact)
            for name, x in order.layers.items()
        }

    def list_taken(self, checkpoint: str) -> dict[str, Taken]:
        """The layers of a checkpoint that was pruned, as a graft takes them. Raises DamagedArtifact."""
        manifest = self._read(checkpoint)
        return {
            name: Taken(LayerOrder(recipe=x.recipe, zeros=x.zeros, taken=x.taken or checkpoint), record.artifact)
            for (name, x), record in zip(manifest.tasks.items(), manifest.layers.values(), strict=True)
        }

    def _prune_all(self, tasks: Tasks, polish: int, progress: Progress) -> dict[str, str]:
        """The artifact of every layer, all of which are in the model, polished on so many tokens."""
        if not polish:
            return self._prune(tasks, progress)
        task = next(iter(tasks.values()))
        stored = self._profiles.read(task.profile)
        text = PolishText(stored.calibration, stored.mix)
        self._polisher.refuse(polish, text)  # before anything is pruned
        return self._polisher.polish(self._prune(tasks, progress), polish, progress, text)

    def _prune(self, tasks: Tasks, progress: Progress) -> dict[str, str]:
        """The artifact of every layer, all of which are in the model."""
        dense = {name: task for name, task in tasks.items() if not task.recipe.in_order}
        # Before any layer is pruned: it may run the dense model.
        asked = {(task.profile, task.recipe) for task in tasks.values() if task.recipe.changes_survivors}
        for profile, recipe in sorted(asked, key=lambda pair: (pair[0], pair[1].exact_label)):
            if recipe.weighs_tokens and recipe.in_order:
                self._profiles.find_token_weights(profile, progress)
            elif not recipe.in_order:
                self._profiles.find_moments(profile, progress, weighted=recipe.weighs_tokens)
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
        lacking = {name: task for name, task in missing.items() if self._lacks_moments(task)}
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

    def _lacks_moments(self, task: LayerTask) -> bool:
        return self._profiles.lacks_moments(task.profile, task.recipe)

    def _compute_by_block(self, tasks: Tasks, progress: Progress) -> Generator[tuple[str, str], None, None]:
        """As `_compute_all`, of layers whose second moments are not kept: those of a block once these are collected.

        The text passes the dense model meanwhile, and it is dense that all layers are left.
        """
        kinds: dict[tuple[str, bool], dict[str, LayerTask]] = {}
        for name, task in tasks.items():
            kinds.setdefault((task.profile, task.recipe.weighs_tokens), {})[name] = task
        for (profile, weighted), chosen in kinds.items():
            with self._profiles.pass_moments(profile, progress, weighted=weighted) as hold:
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
        if not patterned and task.zeros <= int((dense_OI == 0).sum()):
            artifact = DENSE
        return artifact if artifact and self._weights.install(name, artifact) else ""

    def _prune_in_order(self, tasks: Tasks, made: Mapping[str, str], progress: Progress) -> dict[str, str]:
        """Block by block: each is pruned by what it reads in the model whose earlier blocks are pruned already.

        Within a block all layers of sequential statistics are pruned by the inputs that they have while the whole block
        is still dense, as in the loops of Wanda and SparseGPT (`tools.plans.methods.Method.statistics`); then those of
        stages, one stage after another, by what these read once all before them in the block are pruned. The pruned
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
                at_once = {name: task for name, task in own.items() if task.recipe.statistics == "sequential"}
                keys = self._make_keys(at_once, below)
                if missing := self._install_made(at_once, keys, index, done):
                    for layer in layers:
                        self._weights.install(layer.name, DENSE)
                    self._prune_present(walk, block, missing, keys, done)
                if staged := {name: task for name, task in own.items() if name not in at_once}:
                    # what becomes of a layer hangs on all that is to become of its block
                    planned = self._make_keys(own, below) | done
                    keys = self._make_keys(staged, [*below, *(planned[layer.name] for layer in layers)])
                    if missing := self._install_made(staged, keys, index, done):
                        self._prune_stages(walk, block, missing, keys, done)
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

    def _prune_stages(self, walk: Walk, block: int, tasks: Tasks, keys: Mapping[str, str], done: Made) -> None:
        """Prune layers of a block, each stage by what it reads once all layers are as they are `done` before it."""
        for stage in find_stages(self._crew.team, walk, block):
            missing = {name: tasks[name] for name in stage if name in tasks}
            for layer in self._weights.by_block[block]:
                self._weights.install(layer.name, done.get(layer.name, DENSE))
            if missing:
                self._prune_present(walk, block, missing, keys, done, stage)

    def _prune_present(
        self, walk: Walk, block: int, tasks: Tasks, keys: Mapping[str, str], done: Made, stage: Sequence[str] = ()
    ) -> None:
        """Prune layers of a block, all of one `stage` where it is given, by what they read in the model as it is.

        Each kind of sums is made for itself, so that a layer's are the same, to the bit, whatever the others' are.
        """
        team, extent, layers = self._crew.team, self._crew.extent, self._weights.by_block[block]
        kinds: dict[tuple[bool, bool], dict[str, LayerTask]] = {}
        for name, task in tasks.items():
            kinds.setdefault((task.recipe.weighs_tokens, task.recipe.changes_survivors), {})[name] = task
        for (weighs, full), chosen in sorted(kinds.items()):
            profile = next(task.profile for task in chosen.values())
            moments = collect_moments(
                *(team, extent, walk, block, layers),
                full=full,
                purpose="pruning",
                names=stage,
                weights=self._profiles.read_token_weights(profile, block) if weighs else None,
            )
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
                    weight_OI = unpack_pruned(tensors, self._weights.dense[name])
                    yield name, self._keep(name, weight_OI, tensors, damping)
            return
        for zeros, recipe, profile in _group(tasks):
            for name in zeros:
                heed_stop()
                yield name, self._compute(name, LayerTask(zeros[name], recipe, profile), present)

    def _list_jobs(self, cluster: Cluster, tasks: Tasks, present: Moments | None) -> Iterator[PruneLayers]:
        for zeros, recipe, profile in _group(tasks):
            for group in self._profiles.list_work(cluster, zeros, profile, recipe, present):
                yield PruneLayers(recipe, group)

    def _compute(self, name: str, task: LayerTask, present: Moments | None = None) -> str:
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

    # --- a little more sparsity --------------------------------------------------------------------------------

    def refuse_move(self, checkpoint: str) -> None:
        """Raises ImpossiblePlan for a checkpoint whose layers cannot be moved."""
        if any(task.recipe.pattern for task in self._read(checkpoint).tasks.values()):
            raise ImpossiblePlan("a pattern says how many weights of a layer are zero: such layers cannot be moved")

    @contextmanager
    def move(self, checkpoint: str, zeros: Sequence[Mapping[str, int]]) -> Iterator[list[str]]:
        """Checkpoints that are this one but for the layers named by each, which have so many zeros; gone afterwards.

        The survivors of least score go, by the mask of the layer's recipe, by the two-sided one where its method moves
        survivors; those that stay are not fitted again. The weights of `checkpoint` are in the model before and after.
        """
        made: list[str] = []
        self.restore(checkpoint)
        try:
            for counts in zeros:
                made.append(self._move(checkpoint, counts))
            yield made
        finally:
            self.restore(checkpoint)
            own = set(self.list_artifacts(checkpoint).values())
            for moved in made:
                for artifact in set(self.list_artifacts(moved).values()) - own:
                    self._store.path(artifact, ".safetensors").unlink(missing_ok=True)
                self._store.path(moved, ".json").unlink(missing_ok=True)

    def _move(self, checkpoint: str, zeros: Mapping[str, int]) -> str:
        tasks, made = dict(self._read(checkpoint).tasks), self.list_artifacts(checkpoint)
        for name, count in zeros.items():
            heed_stop()
            task = tasks[name]
            method = "two-sided" if METHODS[task.recipe.method].changes_survivors else task.recipe.method
            mask = Recipe(method=method, refit=False, gamma=task.recipe.gamma, statistics="dense")
            with explain_layer(f"moving layer {name}"):
                statistics = self._profiles.find_statistics(task.profile, name, mask)
                layer = self._weights.by_name[name]
                moved_OI = prune_layer(mask, layer.weight_OI.to(layer.device), statistics, count).weight_OI
                made[name] = self._store.write_tensors(pack_pruned(moved_OI, values=True))
            tasks[name] = LayerTask(count, task.recipe, task.profile)
        return self._store.write_json(make_checkpoint(tasks, made).model_dump(exclude_none=True))

    # --- checkpoints -------------------------------------------------------------------------------------------

    def restore(self, checkpoint: str) -> list[str]:
        """Put a checkpoint's weights back bit for bit; the names of the layers that differed.

        A damaged artifact is computed again and must come out with the same hash; otherwise DamagedArtifact.
        """
        if checkpoint == DENSE:
            return self._weights.restore_dense()
        manifest = self._read(checkpoint)
        artifacts = {name: record.artifact for name, record in manifest.layers.items()}
        changed = self._weights.restore(artifacts, partial(self._make_again, checkpoint, manifest))
        if any(record.taken for record in manifest.layers.values()):
            # a layer that is made again may bring all others of its own checkpoint with it
            self._weights.restore(artifacts, partial(self._make_again, checkpoint, manifest))
        return changed

    def _make_again(self, checkpoint: str, manifest: Checkpoint, name: str) -> None:
        """Compute a layer of a checkpoint once more, as the checkpoint that it was made for."""
        if taken := manifest.layers[name].taken:
            return self._make_again(taken, self._read(taken), name)
        task, expected = manifest.tasks[name], manifest.layers[name].artifact
        if manifest.cut:
            made = self._cuts.make(manifest.cut, ignore_progress)[0][name]
        elif manifest.polish or task.recipe.in_order or self._lacks_moments(task):
            made = self._prune_all(manifest.tasks, manifest.polish or 0, ignore_progress)[name]
        else:
            made = self._compute(name, task)
        if made == expected:
            return
        if hash_as_earlier(self._store.read_tensors(made), self._weights.dense[name]) != expected:
            raise DamagedArtifact(
                f"layer {name} of checkpoint {checkpoint[:12]} is damaged and does not come out the same again"
            )
        self._weights.installed[name] = expected  # the same weights

    def read_checkpoint(self, checkpoint: str) -> dict[str, LayerRecord]:
        """The layers of a checkpoint. Raises DamagedArtifact when its manifest is not whole."""
        if checkpoint == DENSE:
            return {name: LayerRecord(artifact=DENSE, zeros=0) for name in self._weights.by_name}
        return self._read(checkpoint).layers

    def list_artifacts(self, checkpoint: str) -> dict[str, str]:
        """The artifact of each layer of a checkpoint. Raises DamagedArtifact."""
        return {name: record.artifact for name, record in self.read_checkpoint(checkpoint).items()}

    def _read(self, checkpoint: str) -> Checkpoint:
        return Checkpoint.model_validate(self._store.read_json(checkpoint))

    def is_made_of(self, checkpoint: str, profile: str, order: WorkOrder) -> bool:
        """Whether a checkpoint is what `prune` makes of these. Raises DamagedArtifact without a whole manifest."""
        if checkpoint == DENSE:
            return False
        if order.grafted:
            return self._read(checkpoint).tasks == {n: task for n, (task, _) in self._list_taken_tasks(order).items()}
        if order.cut:
            return self._read(checkpoint).cut == order.cut
        recipes = {layer.recipe for layer in order.layers.values()}
        # known where it was made of it, and worth no measurement where it was not
        known = {recipe: self._profiles.find_known(profile, recipe) for recipe in recipes}
        asked = {name: LayerTask(x.zeros, x.recipe, known[x.recipe]) for name, x in order.layers.items()}
        made = self._read(checkpoint)
        return made.tasks == asked and (made.polish or 0) == order.polish

    def read_polished(self, checkpoint: str) -> Polished | None:
        """What the polish of a checkpoint did; None where it was not polished. Raises DamagedArtifact."""
        manifest = None if checkpoint == DENSE else self._read(checkpoint)
        if manifest is None or not manifest.polish:
            return None
        return self._polisher.read(self.list_artifacts(checkpoint), manifest.polish)

    def planned_sparsity(self, checkpoint: str) -> dict[str, float]:
        """Layer name to the share of zeros that the checkpoint was made for; 0 everywhere for the dense weights."""
        dense = self._weights.dense
        return {name: record.zeros / dense[name].numel() for name, record in self.read_checkpoint(checkpoint).items()}

    def forget(self, keep: list[str]) -> None:
        """Delete the layer artifacts that none of the checkpoints to keep refers to; their recipes stay known."""
        kept = {artifact for checkpoint in keep for artifact in self.list_artifacts(checkpoint).values()}
        for artifact in set(self._index.read().values()) - kept:
            self._store.path(artifact, ".safetensors").unlink(missing_ok=True)


def _group(tasks: Tasks) -> list[tuple[dict[str, int], Recipe, str]]:
    """(zeros by layer, recipe, profile) of all layers that have the last two alike."""
    groups: dict[tuple[Recipe, str], dict[str, int]] = {}
    for name, task in tasks.items():
        groups.setdefault((task.recipe, task.profile), {})[name] = task.zeros
    return [(zeros, recipe, profile) for (recipe, profile), zeros in groups.items()]
