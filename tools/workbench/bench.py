"""The one loaded model of a run: its layers, splits, statistics, and the weights that are in it now.

Everything it makes goes to disk under the hash of its content, so a killed run goes on where it was.
"""

import hashlib
import importlib.metadata
import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.base.errors import UserError
from tools.base.memory import measure_peak
from tools.base.progress import Progress, Warn, Warner
from tools.base.settings import TEAM, TeamSettings, WorkbenchSettings
from tools.base.words import show_size
from tools.estimate.memory import Course, choose_for_run
from tools.estimate.needs import count_cut, count_polish_disk
from tools.measure.recall import encode_questions
from tools.models.blocks import Blocks, Look, check_blocks
from tools.models.disk import plan_disk
from tools.models.experts import check_experts
from tools.models.gguf import reading_once
from tools.models.layers import Layer, find_layers, measure_reach, refuse_small_reach
from tools.models.linear import keep_linear
from tools.models.load import load_model
from tools.models.mapped import list_in_source
from tools.models.positions import refuse_long_windows
from tools.models.readout import check_readout
from tools.models.streamed import find_stream, forget_loading
from tools.results.schema import Reach
from tools.statistics.experts import describe_few
from tools.statistics.kept_passages import PassageFiles, forget_walks
from tools.statistics.shards import count_waiting
from tools.team.worker import Texts, hash_weights
from tools.texts.windows import Windows, count_lead, cut_windows
from tools.workbench.curves import Curves
from tools.workbench.cuts import Cuts
from tools.workbench.evaluate import Evaluator
from tools.workbench.layer_pruning import LayerPruner
from tools.workbench.losses import Losses, gather_crew
from tools.workbench.polish import Polisher
from tools.workbench.profiles import Profiles
from tools.workbench.prune import Pruner
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.weights import Weights
from tools.workbench.written import Author


def fit_disk(
    model: Any,
    layers: list[Layer],
    settings: TeamSettings,
    directory: Path,
    lead: int,
    course: Course,
    warn: Warn,
) -> int | None:
    """Of how many blocks second moments may lie on disk at once; None where there is room for those of all.

    What is there already is room. Raises UserError where all else that the course writes has none, and for a cut that
    cannot be.
    """
    stream = find_stream(model)
    in_source = list_in_source(layers, stream.source) if stream else set[str]()
    free = shutil.disk_usage(directory).free + _count_written(directory)
    if stream:  # the model as it is now, in a file without a name
        free += sum(parameter.nbytes for parameter in model.parameters())
    polish = count_polish_disk(model, layers, settings, lead, course)
    room = min(free, settings.disk * 1e9 or math.inf)
    waiting = count_waiting(settings.count_all("calibration"))
    count = partial(
        plan_disk,
        model,
        layers,
        settings,
        lead=lead,
        streamed=stream is not None,
        in_source=in_source,
        waiting=waiting,
        checkpoints=course.checkpoints,
        sizes=count_cut(model, layers, course),
    )
    plan = count(room - polish)
    needed = plan.bytes + polish
    if needed > room:
        if room < free:
            raise UserError(
                f"a run of this model may write {show_size(needed)} to {directory}, but --disk allows "
                f"{show_size(room)}; allow more"
            )
        raise UserError(
            f"the disk is full: a run of this model may write {show_size(needed, 'GB')} to {directory}, "
            f"but {show_size(free, 'GB')} are free or its own; free some, or use another --runs-dir"
        )
    if plan.at_once:
        kept = count(math.inf).bytes + polish
        warn(
            f"second moments are not kept, which takes a disk of {show_size(kept)}, and {show_size(room)} are "
            "there: they are collected anew whenever layers are pruned, block by block"
        )
    return plan.at_once


def _count_written(directory: Path) -> int:
    """Bytes of all files there."""
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # one that is renamed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


_RUN_BY = ("billhook", "torch", "transformers")
"""Packages of which another version may run a model otherwise."""


def check_once(
    index: Index, settings: WorkbenchSettings, blocks: Blocks, layers: Sequence[Layer], ids_T: Tensor
) -> tuple[list[Layer], list[str]]:
    """As `keep_linear`, of a model that has its dense weights, checked beforehand.

    What was found is kept in the `index`, for whoever resumes: of a model that is streamed it takes eight reads of all
    its weights. Whether they are still the same ones is `refuse_changed`'s to say. Raises UserError for an architecture
    that is not supported.
    """
    versions = [importlib.metadata.version(package) for package in _RUN_BY]
    key = ["checked", settings.model, settings.dtype, str(blocks.model.device), *versions]
    by_name = {layer.name: layer for layer in layers}
    found = index.read_measured(key)
    if found is None or "look" not in found or not by_name.keys() >= set(found["layers"]):
        check_readout(blocks.model, ids_T)
        check_blocks(blocks, ids_T)
        check_experts(blocks.model, ids_T)
        kept, told = keep_linear(blocks, layers, ids_T)
        found = index.keep_measured(
            key, {"layers": [layer.name for layer in kept], "told": told, "look": blocks.look(ids_T)}
        )
    blocks.recall(Look(*found["look"]))
    return [by_name[name] for name in found["layers"]], found["told"]


def refuse_changed(index: Index, settings: WorkbenchSettings, weights: str, rest: str, windows: Windows) -> None:
    """Keep what `weights` of prunable layers and the `rest` of the model, by their hashes, and windows of text the
    settings stand for when they are first seen.

    Raises UserError where they stand for others now: what was measured before would be compared with, or taken for,
    what is measured of them.
    """
    key = ["opened", settings.model_dump_json(exclude=set(TEAM))]
    found = {"weights": weights, "rest": rest, "texts": _hash_windows(windows)}
    known = index.measure_once(key, lambda: found)
    model = f"model {settings.model}"
    for what, word in (("weights", model), ("rest", model), ("texts", "a text")):
        if known[what] != found[what]:
            raise UserError(
                f"{word} is another than when this was begun, by the same name: what was measured holds of it no more; "
                "begin anew, in another directory"
            )


def _hash_windows(windows: Windows) -> str:
    digest = hashlib.sha256()
    for text_BT in (windows.calibration, windows.validation, windows.test):
        digest.update(f"{tuple(text_BT.shape)}\n".encode())
        digest.update(text_BT.numpy().tobytes())
    return digest.hexdigest()


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
