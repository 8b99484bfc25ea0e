"""Pruning by a work order, from the dense weights, and the checkpoints that come of it."""

from functools import partial
from typing import Any

from tools.base.errors import DamagedArtifact, explain_work
from tools.base.progress import Progress, ignore_progress
from tools.plans.cuts import CutOrder
from tools.plans.groups import refuse_two_walks
from tools.plans.work_order import WorkOrder
from tools.results.schema import Polished
from tools.workbench.cuts import Cuts
from tools.workbench.layer_pruning import Checkpoint, LayerPruner, LayerRecord, LayerTask, Tasks, make_checkpoint
from tools.workbench.polish import Polisher, PolishText
from tools.workbench.profiles import Profiles
from tools.workbench.store import DENSE, ArtifactStore, Index
from tools.workbench.weights import Weights


class Pruner:
    """Makes checkpoints, and brings them back."""

    def __init__(
        self,
        weights: Weights,
        profiles: Profiles,
        polisher: Polisher,
        cuts: Cuts,
        store: ArtifactStore,
        index: Index,
        layers: LayerPruner,
    ) -> None:
        self._weights, self._profiles, self._layers = weights, profiles, layers
        self._polisher, self._cuts, self._store, self._index = polisher, cuts, store, index

    # --- prune -------------------------------------------------------------------------------------------------

    @explain_work("pruning")
    def prune(self, profile: str, order: WorkOrder, progress: Progress) -> str:
        """Prune every layer from its dense weights to its number of zeros; the id of the checkpoint.

        Layers whose number of zeros and recipe were made before are read back instead of computed. Those whose recipe
        asks for other than dense statistics are pruned block by block, behind all that is pruned before them, once the
        others have been pruned by what they read in the dense model. An order that asks for it is then polished. Raises
        ImpossiblePlan where a text that a recipe's statistics are to be of is not there, or those behind pruned
        predecessors are to be of several, or too little for a polish, and BrokenPlan for a layer that cannot be pruned
        so: those that were made before it are kept, and the model holds a mixture.
        """
        if order.cut:
            return self._cut(profile, order, order.cut, progress)
        recipes = list(dict.fromkeys(layer.recipe for layer in order.layers.values()))
        refuse_two_walks(recipes)
        for recipe in recipes:
            self._profiles.refuse_statistics(recipe)
        found = {recipe: self._profiles.find(profile, recipe, progress) for recipe in recipes}
        tasks = {name: LayerTask(x.zeros, x.recipe, found[x.recipe]) for name, x in order.layers.items()}
        try:
            made = self._prune_all(tasks, order.polish, progress)
        finally:
            self._profiles.let_go()
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

    def _prune_all(self, tasks: Tasks, polish: int, progress: Progress) -> dict[str, str]:
        """The artifact of every layer, all of which are in the model, polished on so many tokens."""
        if not polish:
            return self._layers.prune(tasks, progress)
        task = next(iter(tasks.values()))
        stored = self._profiles.read(task.profile)
        text = PolishText(stored.calibration, stored.mix)
        self._polisher.refuse(polish, text)  # before anything is pruned
        return self._polisher.polish(self._layers.prune(tasks, progress), polish, progress, text)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def restore(self, checkpoint: str) -> list[str]:
        """Put a checkpoint's weights back bit for bit; the names of the layers that differed.

        A damaged artifact is computed again and must come out with the same hash; otherwise DamagedArtifact.
        """
        if checkpoint == DENSE:
            return self._weights.restore_dense()
        manifest = self._read(checkpoint)
        artifacts = {name: record.artifact for name, record in manifest.layers.items()}
        return self._weights.restore(artifacts, partial(self._make_again, checkpoint, manifest))

    def _make_again(self, checkpoint: str, manifest: Checkpoint, name: str) -> None:
        """Compute a layer of a checkpoint once more."""
        task, expected = manifest.tasks[name], manifest.layers[name].artifact
        if manifest.cut:
            made = self._cuts.make(manifest.cut, ignore_progress)[0][name]
        elif manifest.polish or task.recipe.in_order or self._layers.lacks_moments(task):
            made = self._prune_all(manifest.tasks, manifest.polish or 0, ignore_progress)[name]
        else:
            made = self._layers.compute(name, task)
        if made != expected:
            raise DamagedArtifact(
                f"layer {name} of checkpoint {checkpoint[:12]} is damaged and does not come out the same again"
            )

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
