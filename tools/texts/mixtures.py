"""Calibration text that is partly questions with their answers: how many windows of them, and where they stand."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tools.base.settings import Calibration, WorkbenchSettings
from tools.texts.questions import split_questions, write_pair

if TYPE_CHECKING:
    from torch import Tensor


def write_questions(settings: WorkbenchSettings) -> Iterator[str]:
    """The questions that are asked nowhere else, as documents. Raises UserError where there are too few to ask."""
    return map(write_pair, split_questions(settings.questions, settings.question_pairs, settings.text_cut).rest)


def mix_questions(
    settings: WorkbenchSettings, prose_BT: "Tensor", questions_BT: "Tensor"
) -> "tuple[Tensor, dict[Calibration, Tensor]]":
    """(the calibration text of the run, those with more questions in them that there are enough of).

    `prose_BT` are its windows of running text, `questions_BT` those of questions: at least as many as the run's own
    mix asks for, and as many as the greatest of the others needs, if there are.
    """
    mixed = {
        name: _spread(prose_BT[: settings.calibration_windows - count], questions_BT[:count])
        for name, count in settings.mixes.items()
        if count <= len(questions_BT)
    }
    return _spread(prose_BT, questions_BT[: settings.count_mixed(settings.calibration_mix)]), mixed


def _spread(prose_BT: "Tensor", questions_BT: "Tensor") -> "Tensor":
    """Both kinds of windows, the second evenly spread, so that any first few hold their share of it."""
    import torch

    total, parts = len(prose_BT) + len(questions_BT), [iter(prose_BT), iter(questions_BT)]
    asks = [(i + 1) * len(questions_BT) // total > i * len(questions_BT) // total for i in range(total)]
    return torch.stack([next(parts[kind]) for kind in asks])
