"""Which tasks can be asked, and what is refused before any model is."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.tasks import settings_of
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.base.settings import TaskSettings
from tools.measure.benchmarks import load_benchmarks, refuse_shared_questions


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"freebaseqa": ""}, "the task freebaseqa needs its questions: --freebaseqa file:PATH, such as"),
        ({"freebaseqa": "file:nowhere.jsonl"}, "file of questions nowhere.jsonl does not exist"),
        ({"freebaseqa": "somewhere"}, "source of questions 'somewhere' is not one of hub:NAME"),
        ({"shots": 8}, "has 8 questions, of which the first 8 are exemplars; none is left to ask"),
        ({"tasks": "mmlu", "mmlu": "nowhere"}, "source of MMLU 'nowhere' is neither hub nor file:DIR"),
        ({"tasks": "mmlu", "mmlu": "file:nowhere"}, "directory of MMLU nowhere has no dev.jsonl"),
        ({"tasks": "mmlu", "shots": 4}, "task mmlu_abstract_algebra has 3 exemplars, but 4 shots were asked for"),
        ({"tasks": "mmlu", "mmlu": "hub"}, "task mmlu could not be loaded: "),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_line(data: Path, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError) as told:
        load_benchmarks(settings_of(data, **{"tasks": "freebaseqa", **changes}), "fp32")
    assert error in str(told.value) and "\n" not in str(told.value)


def test_questions_that_plans_are_judged_by_or_may_be_fitted_to_are_not_asked(data: Path) -> None:
    loop = tiny_settings("model", questions=f"file:{data / 'qa.jsonl'}", question_pairs=3)  # judged by 3, 4 and 5
    with pytest.raises(UserError) as told:
        refuse_shared_questions(settings_of(data, "freebaseqa"), loop)
    assert str(told.value) == (
        "freebaseqa would ask 5 questions that plans are judged by or may be fitted to, such as 'Who is 3?'; "
        "choose another --freebaseqa or a smaller --limit"
    )
    refuse_shared_questions(settings_of(data, "freebaseqa", limit=1), loop)
    with pytest.raises(UserError, match="ask 2 questions"):
        refuse_shared_questions(settings_of(data, "freebaseqa", shots=6), loop)


def test_without_the_harness_one_line_says_how_to_get_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert load_benchmarks(TaskSettings(), "fp32") == []
    with pytest.raises(UserError) as told:
        load_benchmarks(settings_of(data, "freebaseqa"), "fp32")
    assert str(told.value) == (
        "tasks need lm-evaluation-harness, which is not installed; try: pip install 'lm-eval>=0.4.13'"
    )


def test_tasks_are_a_list_separated_by_commas() -> None:
    assert TaskSettings.model_validate({"tasks": " mmlu, freebaseqa,,mmlu"}).tasks == ["mmlu", "freebaseqa"]
    assert TaskSettings.model_validate({"tasks": ""}).tasks == []
