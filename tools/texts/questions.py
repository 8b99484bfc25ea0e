"""Questions with short answers, such as FreebaseQA: from the hub or from a file, in order and without repeats."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.base.errors import UserError
from tools.base.named import parse_hub
from tools.base.settings import QUESTION_SOURCE, QUESTIONS, Calibration, WorkbenchSettings

if TYPE_CHECKING:
    from torch import Tensor
import glob
import json
import logging
import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from tools.base.errors import in_one_line
from tools.base.hub import look_at_hub
from tools.base.named import path_of


def check_file(source: str, what: str, *suffixes: str) -> Path:
    """The path of a source `file:PATH` that is there and of the right kind; `what` it is. Raises UserError."""
    path = path_of(source)
    if not os.path.isfile(path):  # unlike Path's, it has an answer for a name too long
        raise UserError(f"{what} {path} does not exist")
    if path.suffix not in suffixes:
        raise UserError(f"{what} {path} must end in {' or '.join(suffixes)}")
    return path


@contextmanager
def explain_unreadable(what: str, source: str) -> Iterator[None]:
    """Inside, whatever goes wrong while rows are read becomes a UserError of one line; `what` the source is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # datasets raises a different class for every way a data set can be missing
        raise UserError(f"{what} {source!r} could not be read: {in_one_line(error)}") from error


def open_rows(source: str) -> Any:
    """The rows of a source `hub:…` or `file:…`, streamed in order.

    Raises UserError for a data set that is not here while no hub answers, and else whatever datasets raises.
    """
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    if source.startswith("hub:"):
        hub, problem = parse_hub(source), look_at_hub()
        try:  # streamed: C4 is 800 GB, and a run reads a few megabytes of it
            return datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True)
        except OSError as error:  # among them ConnectionError and FileNotFoundError
            if problem:
                raise UserError(f"data set {hub.name!r} is not on this machine, and {problem}") from error
            raise
    path = path_of(source)
    files = glob.escape(str(path))  # datasets takes a pattern
    if path.suffix == ".txt":
        return datasets.load_dataset("text", data_files=files, split="train", streaming=True, sample_by="document")
    return _read_objects(path)


def _read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file, of a list in it or of its lines, with every value as it stands there.

    datasets would guess one type for each column: a year among names loses its row, and a date is no text.
    """
    with open(path, encoding="utf-8-sig") as file:  # some editors of Windows begin files with a mark
        rows = _read_lines(file) if path.suffix == ".jsonl" else _read_whole(file.read())
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"rows must be objects, not {str(row)[:40]}")
            yield row


def _read_whole(text: str) -> Iterable[Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:  # lines of JSON are called so, too
        return _read_lines(text.split("\n"))
    return found if isinstance(found, list) else [found]


def _read_lines(lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error


QUESTION_FORM = "Question: {}\nAnswer:"
"""How a question is put; the answer follows after a space."""


class Question(NamedTuple):
    """A question and the answers that count as right, the first of them as the gold one."""

    question: str
    answers: tuple[str, ...]


class Parts(NamedTuple):
    """Questions of one source that are asked for different ends; no question is in two of them."""

    test: list[Question]
    """Asked once, for the report."""
    validation: list[Question]
    """Asked after every trial."""
    rest: Iterator[Question]
    """For the calibration text."""


def write_pair(pair: Question) -> str:
    """A question with its gold answer, as text."""
    return f"{QUESTION_FORM.format(pair.question)} {pair.answers[0]}"


def split_questions(source: str, pairs: int, cut: int = 0) -> Parts:
    """The first `pairs` questions for the report, as many for the trials, and what is left; all behind `cut` times as
    many as are asked.

    Raises UserError when there are too few, or the source cannot be read.
    """
    questions = read_questions(source)
    passed = sum(1 for _ in itertools.islice(questions, 2 * pairs * cut))
    first = list(itertools.islice(questions, 2 * pairs))
    if len(first) < 2 * pairs:
        behind = f" behind {2 * pairs * cut} that --text-cut {cut} passes over" if cut else ""
        raise UserError(
            f"source of questions {source!r} has {passed + len(first)} questions with answers, but {pairs} for the "
            f"trials and {pairs} for the report{behind} were asked for; ask for fewer with --question-pairs"
        )
    return Parts(first[:pairs], first[pairs:], questions)


def check_questions(source: str) -> None:
    """Refuse, before anything is loaded, a source that cannot be read. Raises UserError."""
    if source.startswith("hub:"):
        parse_hub(source)
        return
    if not source.startswith("file:"):
        raise UserError(f"source of questions {source!r} is not one of {QUESTION_SOURCE}")
    check_file(source, "file of questions", ".jsonl", ".json")


def read_questions(source: str) -> Iterator[Question]:
    """The questions of a source, each once. Raises UserError when it cannot be read or is of another form.

    Understood are rows of `question` and `answer` (or `answers`, a list), and FreebaseQA's own: `RawQuestion` (or
    `ProcessedQuestion`) and `Parses` with `AnswersName`, one row each or all of them in a list `Questions`.
    """
    check_questions(source)
    seen: set[str] = set()
    with explain_unreadable("source of questions", source):
        for row in open_rows(source):
            own = row.get("Questions")  # in large files datasets gives one of them a row
            for record in own if isinstance(own, list) else [own] if isinstance(own, dict) else [row]:
                question = _read_record(record, source)
                key = question.question.casefold()
                if question.answers and key not in seen:
                    seen.add(key)
                    yield question


def _read_record(record: dict[str, Any], source: str) -> Question:
    for key in ("question", "RawQuestion", "ProcessedQuestion"):
        text = record.get(key)
        if isinstance(text, str) and text.strip():
            break
    else:
        raise UserError(f"source of questions {source!r} has a row without a question, but {sorted(record)[:10]}")
    for key in ("answers", "answer", "Parses"):
        if record.get(key) is not None:
            found = list(_names(record[key]) if key == "Parses" else _texts(record[key]))
            return Question(" ".join(text.split()), tuple(dict.fromkeys(found)))
    raise UserError(f"source of questions {source!r} has a row without an answer, but {sorted(record)[:10]}")


def _names(value: Any) -> Iterator[str]:
    """All that stands under `AnswersName`; datasets may have turned lists of records into records of lists."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(part) if key == "AnswersName" else _names(part)
    elif isinstance(value, list):
        for part in value:
            yield from _names(part)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.strip():
            yield " ".join(value.split())
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif value is not None and not isinstance(value, bool | dict):  # a year, say, or a date that datasets made of one
        yield str(value)


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
