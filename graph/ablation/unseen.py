"""Texts that rows are judged by and that no arm is given: what is kept of what a goal names, and no text shows."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graph.ablation.settings import AblateSettings
from tools.models.load import load_model
from tools.texts.windows import cut_windows

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.measure.losses import Evaluation
    from tools.workbench.bench import Workbench


class Unseen(NamedTuple):
    """Figures on the test windows of each of these texts, by name."""

    dense: dict[str, float | None]
    """Perplexities."""
    pruned: dict[str, float | None]
    kls: dict[str, float | None]
    """KL(dense || pruned), nats per token."""


NONE = Unseen({}, {}, {})


def take_settings(settings: AblateSettings) -> AblateSettings:
    """The same with these texts in place of those that arms are given."""
    return settings.model_copy(update={"text": settings.unseen, "text_weights": {}, "questions": ""})


def measure_exported(settings: AblateSettings, directory: Path, progress: "Progress") -> Unseen:
    """Of a model that a run of the graph left. Raises UserError where it, or the dense one, cannot be loaded."""
    if not settings.unseen:
        return NONE
    _, tokenizer = dense = load_model(settings)
    pruned = settings.model_copy(update={"model": str(directory)})
    return _measure(settings, tokenizer, lambda: dense[0], lambda: load_model(pruned)[0], progress)


def measure_checkpoint(
    settings: AblateSettings, bench: "Workbench", dense: str, checkpoint: str, progress: "Progress"
) -> Unseen:
    """Of a checkpoint of the workbench, which is in the model afterwards."""
    if not settings.unseen:
        return NONE

    def restore(wanted: str) -> Callable[[], Any]:
        return lambda: (bench.restore(wanted), bench.model)[1]

    return _measure(settings, bench.tokenizer, restore(dense), restore(checkpoint), progress)


def _measure(
    settings: AblateSettings,
    tokenizer: Any,
    make_dense: Callable[[], Any],
    make_pruned: Callable[[], Any],
    progress: "Progress",
) -> Unseen:
    from tools.measure.losses import evaluate_windows  # imports torch

    windows = cut_windows(take_settings(settings), tokenizer)
    names = {"texts": windows.name_each("test", range(len(windows.test))), "weights": dict.fromkeys(windows.texts, 1.0)}

    def evaluate(model: Any, hidden: Any, label: str) -> "tuple[Evaluation, Any]":
        windows_BT = windows.test.to(model.get_input_embeddings().weight.device)
        losses, kept = evaluate_windows(model, windows_BT, hidden, label, progress, lead=windows.lead)
        return losses.model_copy(update=names), kept

    dense, hidden = evaluate(make_dense(), None, "unseen texts, dense")
    pruned, _ = evaluate(make_pruned(), hidden, "unseen texts, pruned")
    return Unseen(
        dense={name: dense.take_text(name).perplexity for name in windows.texts},
        pruned={name: pruned.take_text(name).perplexity for name in windows.texts},
        kls={name: pruned.take_text(name).mean_kl for name in windows.texts},
    )
