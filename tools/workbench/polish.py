"""The polish of a checkpoint: all its pruned layers together, behind the pruning; kept on disk while it goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from tools.base.errors import BrokenPlan, ImpossiblePlan, explain_layer
from tools.base.progress import Progress, Warn, heed_stop
from tools.base.settings import NO_STREAMED_POLISH, Calibration, WorkbenchSettings
from tools.models.artifacts import pack_pruned
from tools.models.blocks import Blocks
from tools.models.unfinished import UNFINISHED, KeptFiles, forget_files
from tools.plans.costs import Means, Schedule, schedule_polish
from tools.polish.gradients import KL, Divergence, Survivors, Vectors
from tools.polish.loop import Adam, Kept, Polish, Problem, Standing
from tools.results.schema import Polished
from tools.statistics.requests import ignore_ticks
from tools.statistics.shards import Sums, join_nodes
from tools.team.cluster import Cluster
from tools.team.requests import MeasureDivergence, OfPolish, SumDivergence
from tools.texts.windows import Windows
from tools.workbench.losses import Crew, Losses
from tools.workbench.store import DENSE, ArtifactStore, Index
from tools.workbench.weights import Weights


class PolishText(NamedTuple):
    """What a polish is on."""

    name: Calibration
    mix: Mapping[str, float]
    """What each text of several counts: those that count nothing are left out."""


VERSION = "2"
"""Of what a polish does beside its optimiser: weights that another one made are others."""


class Polisher:
    """Polishes what is in the model of a workbench."""

    def __init__(
        self,
        settings: WorkbenchSettings,
        blocks: Blocks,
        windows: Windows,
        weights: Weights,
        losses: Losses,
        store: ArtifactStore,
        index: Index,
        crew: Crew,
        warn: Warn,
        directory: Path,
    ) -> None:
        """In the `directory` of a run is kept how far a polish has come that is killed."""
        self._unfinished = directory / UNFINISHED
        self._settings, self._blocks, self._windows, self._weights = settings, blocks, windows, weights
        self._losses, self._store, self._index, self._crew, self._warn = losses, store, index, crew, warn

    def polish(self, pruned: Mapping[str, str], tokens: int, progress: Progress, text: PolishText) -> dict[str, str]:
        """The artifact of every layer, all of which are in the model, after a polish on so many tokens of a text.

        `pruned` are those of the layers before it, which are in the model now. Layers that are dense stay so. Where no
        measure on the windows held out is lower than before, all stay as they were. What was polished before is read
        back.
        Raises ImpossiblePlan where the text or the tokens are too few, BrokenPlan where a number is not finite.
        """
        schedule, pruned = self._schedule(tokens, text), self._sort(pruned)
        names = [name for name, artifact in pruned.items() if artifact != DENSE]
        if not names:
            return dict(pruned)
        key = self._name(pruned, tokens, text)
        found = self._index.read_measured(key)
        if found is None or not self._weights.install_all(found["artifacts"]):
            found = self._index.keep_measured(key, self._make(key, names, pruned, schedule, tokens, progress, text))
        told = Polished.model_validate(found["figures"])
        if not told.helped:
            self._warn(
                f"the polish on {tokens:,} tokens never brought the KL on the windows held out below the "
                f"{told.before:.4f} nats/token from before it; the weights from before it are kept"
            )
        made = {**pruned, **found["artifacts"]}
        self._index.measure_once(_name_figures(made, tokens), told.model_dump)
        return made

    def read(self, made: Mapping[str, str], tokens: int) -> Polished | None:
        """What is known of the polish that the artifacts of all layers came of; None where nothing is."""
        found = self._index.read_measured(_name_figures(self._sort(made), tokens))
        return Polished.model_validate(found) if found else None

    def refuse(self, tokens: int, text: PolishText) -> None:
        """Raises ImpossiblePlan, in one line, where the text or the tokens are too few, or the model is streamed."""
        if any(layer.is_streamed for layer in self._weights.layers):
            raise ImpossiblePlan(NO_STREAMED_POLISH)
        self._schedule(tokens, text)

    def _sort(self, artifacts: Mapping[str, str]) -> dict[str, str]:
        """In the model's order, whichever were made first."""
        return {name: artifacts[name] for name in self._weights.by_name}

    def _schedule(self, tokens: int, text: PolishText) -> Schedule:
        windows, settings = list(self._list_shares(text)), self._settings
        return schedule_polish(len(windows), settings.window, tokens, settings.seed).on(windows)

    def _list_shares(self, text: PolishText) -> dict[int, float]:
        """The calibration windows that count, and how much each does, with a mean of 1."""
        texts = sum(share > 0 for share in text.mix.values()) or 1
        return {window: share * texts for window, share in self._windows.list_shares(text.mix, text.name).items()}

    def _name(self, pruned: Mapping[str, str], tokens: int, text: PolishText) -> list[str]:
        """What the weights depend on: the model and its pruned layers, the text, how it is gone through.

        But for the format of the optimiser's means, which is kept under this, and told with the weights: what was begun
        or done with one is found by a process that would have room for the other.
        """
        windows = hashlib.sha256(self._windows.find_text(text.name).numpy().tobytes()).hexdigest()
        settings, artifacts = self._settings, [f"{name} {artifact}" for name, artifact in pruned.items()]
        order = [str(tokens), str(settings.window), str(self._windows.lead), str(settings.seed)]
        order += [json.dumps(dict(text.mix))] if text.mix else []
        return ["polish", VERSION, Adam.name, self._weights.hash_all_dense(), windows, *order, *artifacts]

    def _make(
        self,
        key: Sequence[str],
        names: Sequence[str],
        pruned: Mapping[str, str],
        schedule: Schedule,
        tokens: int,
        progress: Progress,
        text: PolishText,
    ) -> dict[str, object]:
        hidden = self._read_hidden(schedule, text.name, progress)
        for name, artifact in pruned.items():
            self._weights.install(name, artifact)  # whole, for they were made, or read, just now
        layers = [self._weights.by_name[name] for name in names]
        mark = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        survivors, keeper = Survivors(layers), _Keeper(self._unfinished / f"polish-{mark}")
        shares = self._list_shares(text) if text.mix else {}
        windows_BT = self._windows.find_text(text.name)
        alone = Divergence(self._blocks, survivors, windows_BT, hidden, self._windows.lead, shares)
        problem: Problem = alone
        if cluster := self._crew.cluster:
            problem = _SharedDivergence(cluster, self._weights, survivors, alone, hidden, text.name, shares)
        values = survivors.read()
        means = self._settle_means(key, survivors)
        polish = Polish(problem, survivors, values, Adam(values, means), schedule, keeper, progress)
        for name in names:
            self._weights.installed[name] = ""  # neither the old ones nor the new
        try:
            with explain_layer("polish"):
                standing = polish.run()
        except BrokenPlan:
            keeper.forget()  # nobody carries it out again
            raise
        finally:
            self._weights.installed.update(dict.fromkeys(names, ""))
        artifacts = self._keep_best(polish, names) if standing.best else {name: pruned[name] for name in names}
        for name in names:
            self._weights.install(name, artifacts[name])
        keeper.forget()
        return {"artifacts": artifacts, "figures": _describe(standing, schedule, tokens, means).model_dump()}

    def _settle_means(self, key: Sequence[str], survivors: Survivors) -> Means:
        """What the optimiser holds its means in: what fitted when a polish of this key was first begun, so that one
        that was killed, or whose layers are lost, comes to the same bits however much is free by then."""

        def settle() -> dict[str, Means]:
            if survivors.place.means != "fp32":
                self._warn(f"too little memory for the means of the polish in fp32: they are {survivors.place.means}")
            return {"means": survivors.place.means}

        means: Means = self._index.measure_once(["means of a polish", *key], settle)["means"]
        return means

    def _keep_best(self, polish: Polish, names: Sequence[str]) -> dict[str, str]:
        """Put the best weights into the model and on disk; their artifacts."""
        artifacts = {}
        for layer in polish.survivors.layers:
            weight_OI = polish.survivors.spread(layer, polish.best[layer.name])
            artifacts[layer.name] = self._store.write_tensors(pack_pruned(weight_OI, values=True))
            self._index.add(f"polished {artifacts[layer.name]}", artifacts[layer.name])  # else nobody would forget it
            self._weights.write(layer.name, weight_OI, artifacts[layer.name])
        return artifacts

    def _read_hidden(self, schedule: Schedule, text: Calibration, progress: Progress) -> dict[int, Tensor]:
        """What the dense model's head reads of each window, (T, D) on the CPU; measured once for these windows.

        The dense weights then stay in the model.
        """
        windows = schedule.windows
        ids = hashlib.sha256(self._windows.find_text(text)[windows].numpy().tobytes()).hexdigest()
        key = ["calibration hidden", self._weights.hash_all_dense(), str(self._windows.lead), ids]

        def measure() -> dict[str, str]:
            self._weights.restore_dense()
            hidden_BTD = self._losses.measure(text, windows, None, "dense, calibration", progress)[1]
            return {"hidden": self._store.write_tensors({"hidden": hidden_BTD})}

        hidden_BTD = self._store.read_tensors(self._index.measure_files(key, measure)["hidden"])["hidden"]
        return dict(zip(windows, hidden_BTD, strict=True))


def _name_figures(made: Mapping[str, str], tokens: int) -> list[str]:
    return ["figures of a polish", str(tokens), *(f"{name} {artifact}" for name, artifact in made.items())]


def _describe(standing: Standing, schedule: Schedule, tokens: int, means: Means) -> Polished:
    steps = [0, *schedule.measured][standing.best]
    return Polished(
        tokens=tokens,
        passes=len(schedule.passes),
        seconds=round(standing.seconds, 1),
        before=standing.held_out[0],
        after=standing.held_out[standing.best],
        steps=steps,
        planned_steps=len(schedule.steps),
        means=means,
    )


class _SharedDivergence:
    """`Divergence` by workers, to whom the layers travel whenever they have changed: the same bits on CPUs.

    A single window cannot be shared, and is this process' own.
    """

    def __init__(
        self,
        cluster: Cluster,
        weights: Weights,
        survivors: Survivors,
        alone: Divergence,
        hidden: Mapping[int, Tensor],
        text: Calibration,
        shares: Mapping[int, float],
    ) -> None:
        self._cluster, self._weights, self._survivors, self._alone = cluster, weights, survivors, alone
        self._text, self._shares = text, shares
        self._hidden = {window: cluster.keep(hidden_TD) for window, hidden_TD in hidden.items()}
        self._mark = uuid4().hex

    def count_tokens(self, windows: Sequence[int]) -> int:
        """As `Divergence.count_tokens`."""
        return self._alone.count_tokens(windows)

    def measure(self, windows: Sequence[int]) -> float:
        """As `Divergence.measure`."""
        if len(windows) < 2:
            return self._alone.measure(windows)
        answers = self._cluster.share(MeasureDivergence(self._ask(windows)), len(windows))(ignore_ticks)
        return self._alone.average(windows, [kl for answer in answers for kl in answer])

    def differentiate(self, windows: Sequence[int]) -> Sums:
        """As `Divergence.differentiate`."""
        if len(windows) < 2:
            return self._alone.differentiate(windows)
        answers = self._cluster.share(SumDivergence(self._ask(windows)), len(windows))(ignore_ticks)
        sums = join_nodes((0, len(windows)), {node: sums for answer in answers for node, sums in answer})
        return {name: value.to(self._place(name)) for name, value in sums.items()}

    def _ask(self, windows: Sequence[int]) -> OfPolish:
        heed_stop()
        names = [layer.name for layer in self._survivors.layers]
        for name in names:  # no artifact: whoever needs it is sent what is in the model
            self._weights.installed[name] = f"polish {self._mark} {self._survivors.written}"
        shares = [self._shares[window] for window in windows] if self._shares else []
        return OfPolish(names, list(windows), [self._hidden[window] for window in windows], self._text, shares)

    def _place(self, name: str) -> torch.device:
        return torch.device("cpu") if name == KL else self._weights.device_of(name)


class _Keeper:
    """As `tools.polish.loop.Keeper`, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._files = KeptFiles(directory)

    def read(self) -> Kept | None:
        """As in `Keeper`."""
        found = self._files.read()
        if found is None:
            return None
        tensors: dict[str, Vectors] = {}
        for path, vector in found[1].items():
            what, _, name = path.partition("/")
            tensors.setdefault(what, {})[name] = vector
        return Kept(Standing.model_validate(found[0]["standing"]), tensors)

    def keep(self, kept: Kept) -> None:
        """As in `Keeper`; the one before goes once this is whole. Raises DiskFull."""
        flat = {f"{what}/{name}": x for what, vectors in kept.tensors.items() for name, x in vectors.items()}
        self._files.replace(flat, standing=kept.standing.model_dump())

    def forget(self) -> None:
        """All is done, and kept elsewhere."""
        forget_files(self._files.directory)
