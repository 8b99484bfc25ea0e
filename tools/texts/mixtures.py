"""Questions with their answers as calibration text: in the run's own, and as a text that plans may mix with it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tools.base.settings import QUESTIONS, Calibration, WorkbenchSettings
from tools.texts.questions import split_questions, write_pair

if TYPE_CHECKING:
    from torch import Tensor


def write_questions(settings: WorkbenchSettings) -> Iterator[str]:
    """The questions that are asked nowhere else, as documents. Raises UserError where there are too few to ask."""
    return map(write_pair, split_questions(settings.questions, settings.question_pairs, settings.text_cut).rest)


def mix_questions(
    settings: WorkbenchSettings, prose_BT: "Tensor", questions_BT: "Tensor"
) -> "tuple[Tensor, dict[Calibration, Tensor]]":
    """(the calibration text of the run, the same behind as many windows of questions if there are so many).

    `prose_BT` are its windows of running text, `questions_BT` those of questions: at least as many as the run's own
    mix asks for, which are the first of them and in no other text.
    """
    import torch

    own = settings.count_mixed(settings.calibration_mix)
    run_BT = _spread(prose_BT, questions_BT[:own])
    others_BT = questions_BT[own : own + len(run_BT)]
    return run_BT, {QUESTIONS: torch.cat([others_BT, run_BT])} if len(others_BT) == len(run_BT) else {}


def _spread(prose_BT: "Tensor", questions_BT: "Tensor") -> "Tensor":
    """Both kinds of windows, the second evenly spread, so that any first few hold their share of it."""
    import torch

    total, parts = len(prose_BT) + len(questions_BT), [iter(prose_BT), iter(questions_BT)]
    asks = [(i + 1) * len(questions_BT) // total > i * len(questions_BT) // total for i in range(total)]
    return torch.stack([next(parts[kind]) for kind in asks])
