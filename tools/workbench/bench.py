"""The one loaded model of a run: its layers, splits, statistics, and the weights that are in it now.

Everything it makes goes to disk under the hash of its content, so a killed run goes on where it was.
"""

from pathlib import Path
from typing import Any

import torch

from tools.base.memory import measure_peak
from tools.base.progress import Progress, Warn, Warner
from tools.base.settings import TeamSettings
from tools.estimate.memory import Course, choose_for_run
from tools.measure.recall import encode_questions
from tools.models.blocks import Blocks
from tools.models.gguf import reading_once
from tools.models.layers import find_layers, measure_reach, refuse_small_reach
from tools.models.load import load_model
from tools.models.positions import refuse_long_windows
from tools.models.streamed import find_stream, forget_loading
from tools.results.schema import Reach
from tools.statistics.experts import describe_few
from tools.statistics.kept_passages import PassageFiles, forget_walks
from tools.team.identity import hash_weights
from tools.team.worker import Texts
from tools.texts.windows import count_lead, cut_windows
from tools.workbench.changed import refuse_changed
from tools.workbench.checked import check_once
from tools.workbench.crew import gather_crew
from tools.workbench.curves import Curves
from tools.workbench.cuts import Cuts
from tools.workbench.evaluate import Evaluator
from tools.workbench.layer_pruning import LayerPruner
from tools.workbench.losses import Losses
from tools.workbench.polish import Polisher
from tools.workbench.profiles import Profiles
from tools.workbench.prune import Pruner
from tools.workbench.room import fit_disk
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.weights import Weights
from tools.workbench.written import Author


class Workbench:
    """Owns one loaded model, and the parts that work on it. Raises UserError when model or texts cannot be had.

    What it is asked is done by its parts, where it is described. Where that breaks for want of memory, or in a layer
    whose numbers give no answer, it raises BrokenPlan, of a profile BrokenBaseline: what was finished is kept, and
    `restore` puts any checkpoint back.
    """

    def __init__(
        self,
        settings: TeamSettings,
        directory: Path,
        warn: Warn,
        progress: Progress,
        loaded: tuple[Any, Any] | None = None,
        course: Course | None = None,
    ) -> None:
        """`loaded` are the settings' model, with its dense weights, and tokenizer, of a workbench before this;
        `course` is what the disk must have room for, where it is known."""
        self.settings, self.directory, self._warn = settings, directory, Warner(warn)
        progress("load model", 0, 1)
        self.store = ArtifactStore(directory / "artifacts")
        self.store.remove_unfinished()
        forget_loading(directory)
        course = course or Course()
        with reading_once():
            chosen = settings if loaded else choose_for_run(settings, course)
            self.model, self.tokenizer = loaded or load_model(chosen, self.store.directory)
        if settings.device == "auto" and find_stream(self.model):
            who = "a run and its workers hold" if settings.workers else "a run holds"
            self._warn(
                f"the model and what {who} beside it do not fit the memory that is free: one block of it at a time "
                "comes from disk"
            )
        self.device = self.model.device
        layers = find_layers(self.model)
        lead = count_lead(settings, self.tokenizer)
        refuse_long_windows(self.model, settings.window, lead)
        at_once = fit_disk(self.model, layers, settings, directory, lead, course, self._warn)
        self.index = Index(self.store)
        author = Author(self.model, self.tokenizer, settings, self.index, progress)
        self.windows = cut_windows(settings, self.tokenizer, author)
        self.questions = encode_questions(settings, self.model, self.tokenizer)
        ids_T, blocks = self.windows.calibration[0].to(self.device), Blocks(self.model)
        layers, told = check_once(self.index, settings, blocks, layers, ids_T)
        self.reach = measure_reach(self.model, layers)
        refuse_small_reach(self.reach, partial=settings.partial)
        if self.reach.dense:
            share, names = 1 - self.reach.of_blocks, ", ".join(self.reach.dense)
            warn(f"{share:.2%} of the weights in the blocks are no linear layers to prune, and stay dense: {names}")
        for line in told:
            warn(line)
        stream = find_stream(self.model)
        self.weights = Weights(layers, len(blocks), self.store, self._warn, stream.source if stream else None)
        rest = hash_weights(self.model, {f"{name}.weight" for name in self.weights.by_name})
        refuse_changed(self.index, settings, self.weights.hash_all_dense(), rest, self.windows)
        texts = Texts(self.windows, self.questions)
        kept = None
        if stream and not blocks.leave_something:
            kept = PassageFiles(directory, self.weights.hash_all_dense, self.weights.mark_present)
        else:  # of a process before this one, which streamed
            forget_walks(directory)
        self.crew = gather_crew(settings, blocks, self.weights, texts, directory, self._warn, kept)
        self.losses = Losses(blocks, self.windows, self.weights, directory, self.crew, settings.text_shares)
        self.profiles = Profiles(
            settings, self.windows, self.weights, self.store, self.index, self.crew, self.losses, at_once
        )
        self.curves = Curves(self.weights, self.profiles, self.index, self.crew)
        self.polisher = Polisher(
            *(settings, blocks, self.windows, self.weights, self.losses, self.store, self.index, self.crew, self._warn),
            directory,
        )
        self.cuts = Cuts(
            *(self.model, self.windows, settings.text_shares, self.weights, self.store, self.index),
            directory,
            settings.seed,
        )
        layer_pruner = LayerPruner(self.weights, self.profiles, self.store, self.index, self.crew, self._warn)
        self.pruner = Pruner(
            self.weights, self.profiles, self.polisher, self.cuts, self.store, self.index, layer_pruner
        )
        self.evaluator = Evaluator(
            directory / "evaluations",
            settings,
            self.model,
            self.questions,
            self.weights,
            self.profiles,
            self.pruner,
            self.losses,
            self.crew,
            self._warn,
        )
        progress("load model", 1, 1)

    def close(self) -> None:
        """Let workers go that were gathered."""
        self.crew.close()

    # --- what is in the model -----------------------------------------------------------------------------------

    @property
    def warn(self) -> Warn:
        """Told of what went wrong without stopping the work."""
        return self._warn

    @warn.setter
    def warn(self, tell: Warn) -> None:
        self._warn.tell = tell

    @property
    def told_reach(self) -> Reach:
        """How much of the model is prunable, as reports tell it."""
        reach = self.reach
        return Reach(of_blocks=reach.of_blocks, of_model=reach.of_model, prunable=reach.prunable)

    # --- profile ------------------------------------------------------------------------------------------------

    def profile(self, progress: Progress, first: str = "", *, masks_only: bool = False) -> str:
        """As `Profiles.make`; warns of experts that the calibration text says little of."""
        profile = self.profiles.make(progress, first, masks_only=masks_only)
        if not first and (few := describe_few(self.profiles.read(profile).few, self.weights.layers)):
            self._warn(few)
        return profile

    def list_fitted(self) -> list[int]:
        """The calibration windows that something is fitted to: those of texts that count."""
        return list(self.windows.list_shares(self.settings.text_shares))

    def peak_memory_bytes(self) -> int:
        """The most memory used so far: of all GPUs that the model is on, else of this process."""
        if self.device.type == "cuda":
            devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"} or {self.device}
            return sum(int(torch.cuda.max_memory_allocated(device)) for device in devices)
        return measure_peak()
