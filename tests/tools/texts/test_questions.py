"""Questions and answers in every form that they come in."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rows import write_rows
from tools.base.errors import UserError
from tools.texts.questions import Question, read_questions, split_questions, write_pair

VENUS = Question("Which planet has Maxwell Montes?", ("venus",))
BOTH = Question("Who sang Grace?", ("jeff buckley", "buckley"))
FREEBASE: dict[str, Any] = {
    "Question-ID": "FreebaseQA-dev-1",
    "RawQuestion": "Who sang  Grace?",
    "ProcessedQuestion": "who sang grace",
    "Parses": [
        {"Parse-Id": "P0", "Answers": [{"AnswersMid": "m.1", "AnswersName": ["jeff buckley"]}]},
        {"Parse-Id": "P1", "Answers": [{"AnswersMid": "m.1", "AnswersName": ["buckley", "jeff buckley"]}]},
    ],
}


def test_question_and_answer(tmp_path: Path) -> None:
    rows = [{"question": VENUS.question, "answer": "venus"}, {"question": "Who sang Grace?", "answer": "jeff  buckley"}]
    source = write_rows(tmp_path / "qa.jsonl", [*rows, {"question": "WHO SANG grace?", "answer": "another"}])
    assert list(read_questions(source)) == [VENUS, Question("Who sang Grace?", ("jeff buckley",))]


@pytest.mark.parametrize("name", ["qa.jsonl", "qa.json"])
def test_years_and_dates_are_answers_as_they_stand(name: str, tmp_path: Path) -> None:
    answers: list[Any] = [1969, "Armstrong", "1969-07-20", 2.5, [1970, "the Moon"]]
    rows = [{"question": f"Which, {i}?", "answer": answer} for i, answer in enumerate(answers)]
    found = [question.answers for question in read_questions(write_rows(tmp_path / name, rows))]
    assert found == [("1969",), ("Armstrong",), ("1969-07-20",), ("2.5",), ("1970", "the Moon")]


def test_a_byte_order_mark_and_lines_in_a_json_file(tmp_path: Path) -> None:
    rows = [{"question": "Who sang?", "answer": "a\u2028b"}, {"question": "Who else?", "answer": "c"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name in ("qa.json", "qa.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        found = [question.answers for question in read_questions(f"file:{tmp_path / name}")]
        assert found == [("a b",), ("c",)]


def test_several_answers(tmp_path: Path) -> None:
    rows = [{"question": "Who sang Grace?", "answers": ["jeff buckley", "buckley"]}]
    assert list(read_questions(write_rows(tmp_path / "qa.jsonl", rows))) == [BOTH]


def test_freebaseqa_row_by_row(tmp_path: Path) -> None:
    assert list(read_questions(write_rows(tmp_path / "qa.jsonl", [FREEBASE]))) == [BOTH]


def test_freebaseqa_as_one_file(tmp_path: Path) -> None:
    whole = {"Dataset": "FreebaseQA-dev", "Version": "1.0", "Questions": [FREEBASE]}
    assert list(read_questions(write_rows(tmp_path / "FreebaseQA-dev.json", whole))) == [BOTH]


def test_freebaseqa_as_large_files_are_read(tmp_path: Path) -> None:
    split = {"Dataset": "FreebaseQA-dev", "Version": "1.0", "Questions": FREEBASE}
    assert list(read_questions(write_rows(tmp_path / "qa.jsonl", [split]))) == [BOTH]


def test_records_of_lists(tmp_path: Path) -> None:
    turned = {"Parse-Id": ["P0"], "Answers": [{"AnswersMid": ["m.1"], "AnswersName": [["jeff buckley", "buckley"]]}]}
    assert list(read_questions(write_rows(tmp_path / "qa.jsonl", [{**FREEBASE, "Parses": turned}]))) == [BOTH]


@pytest.mark.parametrize(
    ("name", "rows", "error"),
    [
        ("qa.txt", [{}], "must end in .jsonl or .json"),
        ("qa.jsonl", [{"text": "no question"}], "has a row without a question, but ['text']"),
        ("qa.jsonl", [{"question": "Who?"}], "has a row without an answer, but ['question']"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, rows: Any, error: str) -> None:
    with pytest.raises(UserError) as told:
        list(read_questions(write_rows(tmp_path / name, rows)))
    assert error in str(told.value)


def test_missing_and_strange_sources() -> None:
    with pytest.raises(UserError, match=r"file of questions nowhere\.jsonl does not exist"):
        list(read_questions("file:nowhere.jsonl"))
    with pytest.raises(UserError, match="source of questions 'pydoc' is not one of hub:NAME"):
        list(read_questions("pydoc"))


def test_parts_are_disjoint_and_in_order(tmp_path: Path) -> None:
    rows = [{"question": f"Number {i}?", "answer": str(i)} for i in range(7)]
    parts = split_questions(write_rows(tmp_path / "qa.jsonl", rows), 3)
    numbers = [[pair.answers[0] for pair in part] for part in (parts.test, parts.validation, parts.rest)]
    assert numbers == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert write_pair(parts.test[1]) == "Question: Number 1?\nAnswer: 1"


def test_parts_of_a_later_cut_are_other_questions(tmp_path: Path) -> None:
    rows = [{"question": f"Number {i}?", "answer": str(i)} for i in range(14)]
    source = write_rows(tmp_path / "qa.jsonl", rows)
    parts = split_questions(source, 3, cut=1)
    numbers = [[pair.answers[0] for pair in part] for part in (parts.test, parts.validation, parts.rest)]
    assert numbers == [["6", "7", "8"], ["9", "10", "11"], ["12", "13"]]
    with pytest.raises(UserError, match=r"has 14 questions with answers, but 3 .* behind 12 that --text-cut 2 passes"):
        split_questions(source, 3, cut=2)


def test_too_few_questions(tmp_path: Path) -> None:
    rows = [{"question": f"Number {i}?", "answer": str(i)} for i in range(5)]
    with pytest.raises(UserError, match=r"has 5 questions with answers, but 3 for the trials .* --question-pairs"):
        split_questions(write_rows(tmp_path / "qa.jsonl", rows), 3)
