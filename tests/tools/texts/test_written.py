"""Which prompts serve which split, and documents that repeat themselves or one another."""

import re

import pytest

from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.texts.windows import check_texts
from tools.texts.written import deal_prompts, is_written, list_written, parse_prompts, take_fresh


def test_prompts_of_a_source() -> None:
    assert [is_written(source) for source in ("self", "self:A", "selfish", "pydoc", "file:self")] == [True] * 2 + [
        False
    ] * 3
    assert parse_prompts("self") == []
    assert parse_prompts("self: def f(x): return x|1 | Once upon a time,") == [
        "def f(x): return x|1",
        "Once upon a time,",
    ]


@pytest.mark.parametrize(
    ("sources", "dealt"),
    [
        ({"calibration": "self"}, {"calibration": []}),
        (
            dict.fromkeys(("calibration", "validation", "test"), "self"),
            {"calibration": [], "validation": [], "test": []},
        ),
        ({"calibration": "self:A | B"}, {"calibration": ["A", "B"]}),
        (
            dict.fromkeys(("calibration", "validation", "test"), "self:A | B | C | D"),
            {"calibration": ["A", "B"], "validation": ["C"], "test": ["D"]},
        ),
        (
            {"calibration": "self:A | B", "validation": "self:C", "test": "self:A | B"},
            {"calibration": ["A"], "test": ["B"], "validation": ["C"]},
        ),
    ],
)
def test_no_prompt_serves_two_splits(sources: dict[str, str], dealt: dict[str, list[str]]) -> None:
    assert deal_prompts(tiny_settings("any", **sources)) == dealt


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (
            {"test": "self:"},
            "text source 'self:' has an empty prompt; write self:PROMPT, or self alone for text without one",
        ),
        ({"test": "self:A |  | B"}, "text source 'self:A |  | B' has an empty prompt; write self:PROMPT, or "),
        ({"test": "self:A | B | A"}, "text source 'self:A | B | A' names the prompt 'A' twice; give every prompt once"),
        (
            {"calibration": "self:A", "test": "self:A"},
            "the calibration and test texts come from 1 prompt of one source, 'self:A': what is measured on must come "
            "from other prompts than what is fitted to; give 2 or more, separated by ' | ' (the last for the test "
            "text), or another source",
        ),
        (
            {"calibration": "self:A | B", "validation": "self:B"},
            "the calibration and validation texts come from the same prompt, 'B'; give each its own",
        ),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_loaded(sources: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        check_texts(tiny_settings("any", **sources))


def test_windows_that_the_model_writes_are_counted() -> None:
    settings = tiny_settings("any", calibration="self", validation="self:A")
    assert list_written(settings) == {"calibration": 4, "validation": 3}
    assert list_written(tiny_settings("any")) == {}
    mixed = settings.model_copy(update={"questions": "hub:qa:train", "calibration_mix": 0.5})
    assert list_written(mixed)["calibration"] == 2


def test_loops_and_repeats_are_not_fresh() -> None:
    said: set[tuple[int, ...]] = set()
    plain, loop = list(range(100)), [*range(60), *([7, 8] * 20)]
    assert take_fresh(plain, said) and len(said) == 93
    assert not take_fresh(loop, set()), "31 of its 93 grams: a loop of two tokens has two that are new"
    assert take_fresh([*range(200, 276), *([7, 8] * 12)], set()), "15 of 93 grams are no more than a quarter"
    assert not take_fresh(plain, said), "it was said before"
    assert not take_fresh(plain[:70] + list(range(500, 530)), said)
    assert take_fresh(plain[:20] + list(range(500, 580)), said)
    assert take_fresh([1, 2], said) and not take_fresh([1, 2], said) and not take_fresh([], said)
    before = set(said)
    assert not take_fresh([9] * 50, said) and said == before, "what is thrown away was not said"
