"""What checkpoints lose on texts and know of questions, measured once and kept beside the artifacts."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import BaseModel
from torch import Tensor

from tools.base.errors import BrokenPlan, DamagedArtifact, ImpossiblePlan, explain_work
from tools.base.files import read_json, write_json
from tools.base.progress import Progress, Stopped, Warn, count_up, ignore_progress
from tools.base.settings import TEAM, Split, WorkbenchSettings
from tools.measure.losses import SoFar
from tools.measure.recall import EncodedPair, Recall, count_right, cut_batches, measure_recall, put_together
from tools.plans.work_order import WorkOrder
from tools.results.losses import Evaluation, join_windows
from tools.team.requests import ReadAnswers
from tools.workbench.losses import Crew, Losses, MeasuredText
from tools.workbench.profiles import Profiles
from tools.workbench.prune import Pruner
from tools.workbench.weights import Weights

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench
    from tools.workbench.unfinished import StoredProfile


class Probe(NamedTuple):
    """An order that was tried out."""

    checkpoint: str
    sparsity: float
    losses: Evaluation
    """On a part of the validation text (`Losses.list_part`)."""


def find_best(probes: Iterable[Probe | None]) -> Probe | None:
    """The one of least KL among those of the greatest sparsity; None where there is none."""
    return min(filter(None, probes), key=rank_probe, default=None)


def rank_probe(probe: Probe) -> tuple[float, float]:
    """Less is better: the greatest sparsity, and of these the least KL."""
    kl = probe.losses.mean_kl
    return -round(probe.sparsity, 3), math.inf if kl is None else kl


def probe_orders(
    bench: "Workbench",
    profile: str,
    orders: Sequence[WorkOrder],
    windows: int,
    progress: "Progress",
    *,
    back: str,
    keep: Sequence[str] = (),
    best: Probe | None = None,
) -> list[Probe | str]:
    """Prune by each order as `prune` would, measure it on so many windows of the validation text (`Losses.list_part`),
    and put the weights of the checkpoint `back` back, bit for bit. In place of losses: why one cannot be carried out.

    They are measured at once, no more of them than can be (`Crew.abreast`); each once, then read back. Layers on
    disk are deleted, so that many probes take no more room than those that are measured at once; but for those of
    `back`, of the checkpoints to `keep`, of the best probe of these and the `best` so far, and of these themselves.
    """
    part = bench.losses.list_part("validation", windows)
    keys = [_name_probe(bench.profiles.read(profile), order, part) for order in orders]
    found: dict[int, Probe | str] = {}
    for number, key in enumerate(keys):
        if (known := bench.index.read_measured(key)) is not None:
            found[number] = Probe(known["checkpoint"], orders[number].sparsity, Evaluation.model_validate(known))
    missing = [number for number in range(len(orders)) if number not in found]
    if not missing:
        return [found[number] for number in range(len(orders))]
    batch = dict[int, str]()
    try:
        for number in missing:
            try:
                batch[number] = bench.pruner.prune(profile, orders[number], progress)
            except ImpossiblePlan as error:
                found[number] = str(error)
        evaluations = bench.evaluator.evaluate_each(list(batch.values()), windows, profile, progress, "probe")
        tried = [
            Probe(checkpoint, orders[number].sparsity, losses)
            for (number, checkpoint), losses in zip(batch.items(), evaluations, strict=True)
        ]
        best = find_best([best, *tried])
        bench.pruner.forget([back, *keep, *([best.checkpoint] if best else []), *batch.values()])
    except BrokenPlan as error:
        return [found.get(number, str(error)) for number in range(len(orders))]
    finally:
        bench.pruner.restore(back)
    for number, probe in zip(batch, tried, strict=True):
        bench.index.keep_measured(keys[number], probe.losses.model_dump() | {"checkpoint": probe.checkpoint})
        found[number] = probe
    return [found[number] for number in range(len(orders))]


def _name_probe(profile: "StoredProfile", order: WorkOrder, part: Sequence[int]) -> list[str]:
    """What the losses of an order depend on: its layers, by the statistics that they are pruned by, and the text."""
    recipes = {name: layer.recipe.model_dump_json() for name, layer in order.layers.items()}
    shared = set(recipes.values())
    recipe = shared.pop() if len(shared) == 1 else json.dumps(recipes)
    polish = [f"polished on {order.polish}"] if order.polish else []
    cut = [order.cut.model_dump_json()] if order.cut else []
    return ["probe", profile.means, profile.hidden, recipe, json.dumps(order.zeros), str(part), *polish, *cut]


class Answered(BaseModel):
    """The log-probabilities of the answers in the first batches of questions; null where they are not finite."""

    values: list[float | None]


Begun = TypeVar("Begun", bound=BaseModel)

PART = "validation-part"
"""What losses on a part of the validation text (`Losses.list_part`) are kept under."""


QUESTIONS = "questions"
"""With it begin the names of what was asked."""


def _join(
    known: Evaluation, first: Sequence[int], more: Evaluation, rest: Sequence[int], windows: Sequence[int]
) -> Evaluation:
    """The losses on these windows, of which the `first` are known, and the `rest` were measured behind them."""
    places = [*first, *rest]
    return join_windows(known, more).take([places.index(window) for window in windows])


class Evaluator:
    """Measures checkpoints of one model."""

    def __init__(
        self,
        directory: Path,
        settings: WorkbenchSettings,
        model: Any,
        questions: Mapping[Split, list[EncodedPair]],
        weights: Weights,
        profiles: Profiles,
        pruner: Pruner,
        losses: Losses,
        crew: Crew,
        warn: Warn,
    ) -> None:
        """What was measured lies in `directory`."""
        self._directory, self._model, self._questions, self._weights = directory, model, questions, weights
        self._settings = settings.model_dump_json(exclude=set(TEAM))
        of_no_text = settings.model_copy(update={"text": {}, "text_weights": {}})
        self._asked_by = of_no_text.model_dump_json(exclude=set(TEAM))
        self._profiles, self._pruner, self._losses, self._crew, self._warn = profiles, pruner, losses, crew, warn
        self._calibration_hidden: Tensor | None = None

    @explain_work("measuring the losses")
    def evaluate(self, checkpoint: str, split: Split, profile: str, progress: Progress, label: str = "") -> Evaluation:
        """Losses of a checkpoint on a split (`validation` or `test`); measured once, then read back.

        Windows of the validation text that a probe has measured are not measured again.
        """
        if known := self._read(checkpoint, split):
            return known
        every = list(range(self._losses.count_windows(split)))
        if split == "test":
            return self._measure_once(checkpoint, split, split, every, None, label or split, progress)
        hidden, part = self._profiles.read_hidden(profile), self._read(checkpoint, PART)
        if part is None:
            return self._measure_once(checkpoint, split, split, every, hidden, label or split, progress)
        first = self._losses.list_part("validation", len(part.kl))
        rest = [window for window in every if window not in first]
        name = f"{split}-beside-{len(first)}"
        measured = self._measure_once(checkpoint, name, split, rest, hidden[rest], label or split, progress)
        whole = _join(part, first, measured, rest, every)
        self._keep(self._path(checkpoint, split), whole.model_dump())
        for kept in (name, PART):
            self._path(checkpoint, kept).unlink(missing_ok=True)
        return whole

    def _measure_once(
        self,
        checkpoint: str,
        name: str,
        text: MeasuredText,
        windows: Sequence[int],
        hidden: Tensor | None,
        label: str,
        progress: Progress,
    ) -> Evaluation:
        """Measure some windows of a text, and keep the losses under a name."""
        self._pruner.restore(checkpoint)
        begun = self._path(checkpoint, f"{name}-begun")
        known = self._read_begun(begun, Evaluation)
        so_far = SoFar(known.nll, known.kl) if known and len(known.nll) < len(windows) else SoFar()
        with self._keep_begun(begun, lambda: {"nll": so_far.nll, "kl": so_far.kl}):
            whole = text == "validation" and len(windows) == self._losses.count_windows(text)
            evaluation, _ = self._losses.measure(
                text, windows, hidden, label, progress, from_change=whole, so_far=so_far
            )
        self._keep(self._path(checkpoint, name), evaluation.model_dump())
        begun.unlink(missing_ok=True)
        return evaluation

    def _read_begun(self, path: Path, kind: type[Begun]) -> Begun | None:
        """What was measured before it was interrupted, if it is there and whole."""
        return self._read_kept(path, kind, "what was measured of it so far is measured again")

    def _read_kept(self, path: Path, kind: type[Begun], what: str) -> Begun | None:
        """What was kept, if it is there and whole; else a warning says `what` becomes of it."""
        if not path.is_file():
            return None
        try:
            kept = read_json(path, "")
            if kept.pop("of") == self._name_owner(path):
                return kind.model_validate(kept)
        except (KeyError, ValueError):
            pass
        self._warn(f"{path} is damaged, or of other text; {what}")
        return None

    def _keep(self, path: Path, value: dict[str, Any]) -> None:
        write_json(path, {"of": self._name_owner(path)} | value)

    def _name_owner(self, path: Path) -> str:
        """What a file is about beside its checkpoint: the model and texts; questions are the same
        whatever texts there are beside them, and what a goal makes these count."""
        return self._asked_by if path.name.startswith(QUESTIONS) else self._settings

    @contextmanager
    def _keep_begun(self, path: Path, measured: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Keep what was `measured` when the work inside is asked to stop."""
        try:
            yield
        except Stopped:
            self._keep(path, measured())
            raise

    def _path(self, checkpoint: str, split: str) -> Path:
        return self._directory / f"{split}-{checkpoint[:16]}.json"

    def _read(self, checkpoint: str, split: str) -> Evaluation | None:
        """What was measured before, if it is there and whole."""
        return self._read_kept(self._path(checkpoint, split), Evaluation, f"{split} is measured again")

    @explain_work("measuring the losses")
    def evaluate_each(
        self, checkpoints: Sequence[str], windows: int, profile: str, progress: Progress, label: str = "validation"
    ) -> list[Evaluation]:
        """Losses of checkpoints on so many windows of the validation text (`Losses.list_part`), as many checkpoints at
        once as can be.

        The weights in the model end as they were. Losses on all of the text are kept, and read back, as by `evaluate`;
        those on a part of it for `evaluate`, and for a larger part, to go on from.
        """
        part = self._losses.list_part("validation", windows)
        whole = len(part) == self._losses.count_windows("validation")
        found: dict[str, Evaluation] = {}
        kept: dict[str, Evaluation | None] = {}
        alike: dict[int, list[str]] = {}
        for checkpoint in dict.fromkeys(checkpoints):
            known = self._read(checkpoint, "validation") or self._read(checkpoint, PART)
            count = len(known.kl) if known else 0
            if known and count >= len(part):
                found[checkpoint] = self._losses.take_part(known, windows)
            else:  # a smaller part is among the windows of this one
                kept[checkpoint] = known
                alike.setdefault(count, []).append(checkpoint)
        with self._weights.put_back():
            hidden = self._profiles.read_hidden(profile)
            for count, together in alike.items():
                first = self._losses.list_part("validation", count) if count else []
                rest = [window for window in part if window not in first]
                measured = self._measure_each("validation", together, rest, hidden[rest], label, progress)
                for checkpoint, evaluation in measured:
                    known = kept[checkpoint]
                    found[checkpoint] = _join(known, first, evaluation, rest, part) if known else evaluation
                    path = self._path(checkpoint, "validation" if whole else PART)
                    self._keep(path, found[checkpoint].model_dump())
        return [found[checkpoint] for checkpoint in checkpoints]

    def read_validation(self, checkpoint: str) -> Evaluation | None:
        """What `evaluate` gave on the validation text; None where it was not asked."""
        return self._read(checkpoint, "validation")

    @explain_work("measuring the losses")
    def measure_kl_each(self, checkpoints: Sequence[str], windows: Sequence[int]) -> list[float]:
        """KL(dense || checkpoint) on some windows of the calibration text, as many checkpoints at once as can be.

        inf where it is not finite. The weights in the model end as they were.
        """
        with self._weights.put_back():
            if self._calibration_hidden is None:
                self._weights.restore_dense()
                every = range(self._losses.count_windows("calibration"))
                self._calibration_hidden = self._losses.measure("calibration", every, None, "", ignore_progress)[1]
            hidden = self._calibration_hidden[list(windows)]
            found = dict(self._measure_each("calibration", checkpoints, windows, hidden, "", ignore_progress))
        return [math.inf if (kl := found[checkpoint].mean_kl) is None else kl for checkpoint in checkpoints]

    def _measure_each(
        self,
        split: MeasuredText,
        checkpoints: Sequence[str],
        windows: Sequence[int],
        dense_hidden_BTD: Tensor,
        label: str,
        progress: Progress,
    ) -> Iterator[tuple[str, Evaluation]]:
        """Each checkpoint with its losses on some windows of a text: several by the workers, else one by one."""
        left, cluster = list(dict.fromkeys(checkpoints)), self._crew.cluster
        if cluster is not None and len(left) > 1:
            with suppress(DamagedArtifact):  # `restore` warns of it below, and makes it again
                weights = {checkpoint: self._pruner.list_artifacts(checkpoint) for checkpoint in left}
                handed = self._losses.hand_out(cluster, split, weights, windows, dense_hidden_BTD, label, progress)
                for checkpoint, evaluation in handed:
                    left.remove(checkpoint)
                    yield checkpoint, evaluation
        whole = split == "validation" and len(windows) == self._losses.count_windows("validation")
        for checkpoint in left:
            self._pruner.restore(checkpoint)
            measured = self._losses.measure(split, windows, dense_hidden_BTD, label, progress, from_change=whole)
            yield checkpoint, measured[0]

    @explain_work("measuring the losses")
    def evaluate_other(self, model: Any, profile: str, progress: Progress) -> Evaluation:
        """Losses on the validation text of another model of the same tokens, such as one cut from the dense one."""
        return self._losses.measure_other(model, self._profiles.read_hidden(profile), "validation", progress)

    @explain_work("asking questions")
    def ask(self, checkpoint: str, split: Split, progress: Progress, label: str = "") -> Recall:
        """What a checkpoint knows of the questions of a split; asked once, then read back.

        Raises KeyError in a run that has no questions.
        """
        path = self._path(checkpoint, f"{QUESTIONS}-{split}")
        if kept := self._read_kept(path, Recall, "the questions are asked again"):
            return kept
        self._pruner.restore(checkpoint)
        begun = self._path(checkpoint, f"{QUESTIONS}-{split}-begun")
        known = self._read_begun(begun, Answered)
        so_far = [math.nan if value is None else value for value in known.values] if known else []
        with self._keep_begun(begun, lambda: {"values": [x if math.isfinite(x) else None for x in so_far]}):
            recall = self._ask(self._questions[split], split, label or "questions", progress, so_far)
        self._keep(path, recall.model_dump())
        begun.unlink(missing_ok=True)
        return recall

    def _ask(
        self, pairs: list[EncodedPair], split: Split, label: str, progress: Progress, so_far: list[float]
    ) -> Recall:
        if self._crew.cluster is None:
            return measure_recall(self._model, pairs, label, progress, so_far)
        batches = len(cut_batches(pairs))
        ticks = count_up(progress, label, batches)
        answers = self._crew.cluster.share(ReadAnswers(split), batches)(ticks)
        return put_together(pairs, [value for answer in answers for value in answer])

    @explain_work("asking questions")
    def count_right(self, checkpoint: str, tokenizer: Any, split: Split, label: str, progress: Progress) -> int:
        """As `tools.measure.recall.count_right`, of a checkpoint, whose weights stay in the model."""
        self._pruner.restore(checkpoint)
        return count_right(self._model, tokenizer, self._questions[split], label, progress)
