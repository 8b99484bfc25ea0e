"""Texts that rows are judged by and that no arm is given: what is kept of what a goal names, and no text shows."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graph.ablation.settings import AblateSettings
from tools.models.load import choose_device, load_model
from tools.texts.windows import Windows, cut_windows
from tools.workbench.store import DENSE

if TYPE_CHECKING:
    from torch import Tensor

    from tools.base.progress import Progress
    from tools.results.losses import Evaluation
    from tools.workbench.bench import Workbench


class Unseen(NamedTuple):
    """Figures on the test windows of each of these texts, by name; none where there are no such texts."""

    dense: dict[str, float | None]
    """Perplexities."""
    pruned: dict[str, float | None]
    kls: dict[str, float | None]
    """KL(dense || pruned), nats per token."""


NONE = Unseen({}, {}, {})


def list_settings(settings: AblateSettings) -> list[AblateSettings]:
    """The settings with the texts that arms are given and, where there are any, with these in their place."""
    unseen = settings.model_copy(update={"text": settings.unseen, "text_weights": {}, "questions": ""})
    return [settings, unseen] if settings.unseen else [settings]


def measure_exported(settings: AblateSettings, directory: Path, progress: "Progress") -> Unseen:
    """Of a model that a run of the graph left. Raises UserError where it, or the dense one, cannot be loaded."""
    if not settings.unseen:
        return NONE
    model, tokenizer = load_model(choose_device(settings), directory.parent)
    windows = _cut(settings, tokenizer)
    dense, hidden_BTD = _evaluate(model, windows, None, progress)
    del model  # before the other one is loaded
    model, _ = load_model(choose_device(settings.model_copy(update={"model": str(directory)})), directory.parent)
    return _describe(windows, dense, _evaluate(model, windows, hidden_BTD, progress)[0])


def measure_checkpoint(settings: AblateSettings, bench: "Workbench", checkpoint: str, progress: "Progress") -> Unseen:
    """Of a checkpoint of the workbench, which is in the model afterwards."""
    if not settings.unseen:
        return NONE
    windows = _cut(settings, bench.tokenizer)
    bench.pruner.restore(DENSE)
    dense, hidden_BTD = _evaluate(bench.model, windows, None, progress)
    bench.pruner.restore(checkpoint)
    return _describe(windows, dense, _evaluate(bench.model, windows, hidden_BTD, progress)[0])


def measure_dense(settings: AblateSettings, bench: "Workbench", progress: "Progress") -> dict[str, float | None]:
    """Perplexities of the dense model, which is in the workbench afterwards."""
    if not settings.unseen:
        return {}
    windows = _cut(settings, bench.tokenizer)
    bench.pruner.restore(DENSE)
    return _list_perplexities(windows, _evaluate(bench.model, windows, None, progress)[0])


def _cut(settings: AblateSettings, tokenizer: Any) -> Windows:
    return cut_windows(list_settings(settings)[-1], tokenizer)


def _evaluate(
    model: Any, windows: Windows, dense_hidden_BTD: "Tensor | None", progress: "Progress"
) -> "tuple[Evaluation, Tensor]":
    """(losses of the test windows, hidden states); the dense model has no reference."""
    from tools.measure.losses import evaluate_by_blocks, evaluate_windows  # imports torch
    from tools.models.blocks import Blocks
    from tools.models.streamed import find_stream

    windows_BT = windows.test.to(model.device)
    label = f"unseen texts, {'dense' if dense_hidden_BTD is None else 'pruned'}"
    about = (windows_BT, dense_hidden_BTD, label, progress)
    if find_stream(model):
        losses, hidden_BTD = evaluate_by_blocks(Blocks(model), *about, lead=windows.lead)
    else:
        losses, hidden_BTD = evaluate_windows(model, *about, lead=windows.lead)
    return losses.model_copy(update={"texts": windows.name_each("test", range(len(windows_BT)))}), hidden_BTD


def _describe(windows: Windows, dense: "Evaluation", pruned: "Evaluation") -> Unseen:
    kls = {name: pruned.take_text(name).mean_kl for name in windows.texts}
    return Unseen(_list_perplexities(windows, dense), _list_perplexities(windows, pruned), kls)


def _list_perplexities(windows: Windows, losses: "Evaluation") -> dict[str, float | None]:
    return {name: losses.take_text(name).perplexity for name in windows.texts}
