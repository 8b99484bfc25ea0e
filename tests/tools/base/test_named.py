"""Named texts and their weights, from flags, variables and YAML."""

import re
from typing import Any

import pytest

from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.base.settings import WorkbenchSettings

TEXT = {"code": "pydoc", "prose": "self:A, B | C"}


def read(*arguments: str) -> WorkbenchSettings:
    parser = Parser(prog="prune")
    add_flags(parser, WorkbenchSettings)
    return read_options(WorkbenchSettings, parse_flags(parser, WorkbenchSettings, list(arguments))[1], None)


def test_flags_variables_and_mappings_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = read("--text", "code=pydoc", "--text", "prose= self:A, B | C ", "--text-weights", "code=3, prose=1")
    monkeypatch.setenv("BILLHOOK_TEXT", "code=pydoc\nprose=self:A, B | C\n")
    monkeypatch.setenv("BILLHOOK_TEXT_WEIGHTS", "code=3,prose=1")
    assert flags == read() == WorkbenchSettings(text=TEXT, text_weights={"code": 3, "prose": 1})
    assert flags.text_shares == {"code": 0.75, "prose": 0.25}
    assert (flags.calibration_text, flags.name_texts("test")) == (
        "0.75 of pydoc + 0.25 of self:A, B | C",
        "75% code pydoc + 25% prose self:A, B | C",
    )


def test_counts_are_those_of_each_text() -> None:
    named = tiny_settings("any", text=TEXT, gradient_windows=3)
    assert (named.count_all("calibration"), named.back_propagated, named.validation_tokens) == (8, 6, 6 * 64)
    assert named.text_shares == {"code": 0.5, "prose": 0.5} and named.count_fitted() == 8
    one = named.model_copy(update={"text_weights": {"code": 0.0, "prose": 2.0}})
    assert one.text_shares == {"code": 0, "prose": 1} and one.count_fitted() == 4
    assert one.calibration_text == "1 of self:A, B | C", "what counts nothing does not tell texts apart"


def test_without_named_texts_settings_are_called_what_they_were() -> None:
    plain = tiny_settings("any")
    assert "text" not in plain.model_dump() and "text_weights" not in plain.model_dump_json().split('"')
    assert (plain.text_shares, plain.name_texts("test"), plain.calibration_text) == ({}, "pydoc", "pydoc")
    assert (plain.count_all("calibration"), plain.back_propagated, plain.count_fitted()) == (4, 2, 4)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"text": ["code=pydoc", "code=self"]}, "text: the name 'code' is given twice, not "),
        ({"text": ["Code=pydoc"]}, "text: 'Code' is no name of a text; names begin with a small letter, and have"),
        ({"text": ["pydoc"]}, "text: a text is given as NAME=SOURCE, such as code=file:code.txt, not "),
        ({"text": ["code="]}, "text: a text is given as NAME=SOURCE, such as code=file:code.txt, not "),
        ({"text": {f"t{i}": "self" for i in range(17)}}, "text: a run has at most 16 named texts, not "),
        (
            {"text": TEXT, "calibration": "self", "test": "self"},
            "text names texts in place of calibration and test; give the one or the other",
        ),
        (
            {"text": TEXT, "questions": "hub:qa:train", "calibration_mix": 0.5},
            "calibration_mix is for runs without named texts; name the questions as one of them",
        ),
        (
            {"text": TEXT, "text_weights": "code=1,c=1"},
            "text_weights weigh 'c', which is none of the texts code, prose",
        ),
        (
            {"text": TEXT, "text_weights": "code=1"},
            "text_weights have none for 'prose'; 0 measures it and fits nothing to it",
        ),
        (
            {"text": TEXT, "text_weights": {"code": 0, "prose": 0}},
            "text_weights are all 0: nothing would be fitted to any text",
        ),
        ({"text_weights": "code=1"}, "text_weights weigh named texts, and there are none; name them with text"),
        (
            {"text": TEXT, "text_weights": "code=-1,prose=1"},
            "text_weights: the weight of 'code' must be 0 or more, not",
        ),
        ({"text": TEXT, "text_weights": "code=inf,prose=1"}, "text_weights: the weight of 'code' must be 0 or more,"),
        (
            {"text": TEXT, "text_weights": "code,prose"},
            "text_weights: weights are given as NAME=WEIGHT, such as code=3",
        ),
        ({"text": TEXT, "text_weights": "code=x,prose=1"}, "text_weights: weights are given as NAME=WEIGHT, such as"),
    ],
)
def test_bad_input_is_one_line(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(line)}") as refusal:
        read_options(WorkbenchSettings, fields, None)
    assert "\n" not in str(refusal.value)
