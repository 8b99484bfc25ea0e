"""Named texts, each cut into windows of its own for every split."""

import re
from pathlib import Path

import pytest
import torch

from tests.named import name_texts
from tests.rows import prose, write_questions, write_rows
from tests.tiny import make_beginning_tokenizer, make_tiny_tokenizer, tiny_settings
from tools.base.errors import UserError
from tools.texts.questions import split_questions, write_pair
from tools.texts.windows import check_texts, check_windows, cut_windows
from tools.texts.written import deal_prompts, list_written


def test_a_split_is_the_windows_of_one_text_after_another(tmp_path: Path) -> None:
    named = name_texts(tmp_path)
    both = cut_windows(tiny_settings("any", **named), make_tiny_tokenizer())
    assert both.texts == ("code", "prose")
    assert [len(split) for split in both[:3]] == [8, 6, 4]
    for place, name in enumerate(both.texts):
        source = dict.fromkeys(("calibration", "validation", "test"), named["text"][name])
        alone = cut_windows(tiny_settings("any", **source), make_tiny_tokenizer())
        for whole, own in zip(both[:3], alone[:3], strict=True):
            assert torch.equal(whole[place * len(own) : (place + 1) * len(own)], own)
    assert both.list_each("validation", range(1, 3)) == [1, 2, 4, 5]
    assert both.name_each("test", [0, 3, 1]) == ["code", "prose", "code"]
    check_windows(tiny_settings("any", **named), make_tiny_tokenizer())
    assert both.list_in_proportion({"code": 0.5, "prose": 0.5}) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert both.list_in_proportion({"code": 0.25, "prose": 0.75}) == [4, 5, 0, 6, 7], "one of four, nearly"
    assert both.list_in_proportion({"code": 0.34, "prose": 0.66}) == [4, 0, 5, 6, 2, 7]
    assert both.list_in_proportion({"code": 0.001, "prose": 0.999}) == [4, 5, 0, 6, 7], "one at least"
    assert both.list_in_proportion({"code": 1.0, "prose": 0.0}) == [0, 1, 2, 3]
    alone = cut_windows(tiny_settings("any"), make_tiny_tokenizer())
    assert alone.list_in_proportion({}) == [0, 1, 2, 3]
    weights = ({}, {"code": 1.0, "prose": 3.0}, {"code": 1.0, "prose": 0.0})
    counted = [tiny_settings("any", **{**named, "text_weights": own}).count_in_proportion() for own in weights]
    assert [*counted, tiny_settings("any").count_in_proportion()] == [8, 5, 4, 4]


def test_windows_of_texts_without_names_have_none() -> None:
    windows = cut_windows(tiny_settings("any"), make_tiny_tokenizer())
    assert (windows.texts, windows.list_each("validation", range(2))) == ((), [0, 1])
    assert windows.name_each("validation", [0, 1]) == []


def test_texts_of_one_source_take_consecutive_parts_of_it(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": prose(0, 5000)}])
    settings = tiny_settings("any", text={"a": source, "b": source})
    windows, tokenizer = cut_windows(settings, make_beginning_tokenizer()), make_tiny_tokenizer()
    assert windows.lead == 1 and windows.texts == ("a", "b")
    parts = [windows.calibration[:4], windows.validation[:3], windows.test[:2]]
    parts += [windows.calibration[4:], windows.validation[3:], windows.test[2:]]
    text = tokenizer.decode(torch.cat(parts)[:, 1:].flatten().tolist())
    assert prose(0, 5000).startswith(text)


@pytest.mark.parametrize("cut", [0, 1])
def test_questions_that_are_asked_may_be_a_text_of_all_others(tmp_path: Path, cut: int) -> None:
    source = write_questions(tmp_path / "qa.jsonl", 200)
    prose_text = name_texts(tmp_path)["text"]["prose"]
    settings = tiny_settings(
        "any", text={"facts": source, "prose": prose_text}, questions=source, question_pairs=10, text_cut=cut
    )
    tokenizer = make_tiny_tokenizer()
    check_texts(settings)
    check_windows(settings, tokenizer)
    windows, rest = cut_windows(settings, tokenizer), split_questions(source, 10, cut).rest
    ids_T = torch.cat([windows.calibration[:4], windows.validation[:3], windows.test[:2]]).flatten()
    text = "\n\n".join(map(write_pair, rest))
    every_T = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert every_T[cut * len(ids_T) :][: len(ids_T)].equal(ids_T), "no seed has another's windows"
    same = settings.model_copy(update={"questions": source.replace("file:", "file:/")})
    assert cut_windows(same, tokenizer).calibration.equal(windows.calibration), "one file by two names"
    with pytest.raises(
        UserError, match=r"^text source '.+' is too short: 400 facts .+ beside the 20 questions that are"
    ):
        cut_windows(settings.model_copy(update={"calibration_windows": 400}), tokenizer)


def test_texts_are_checked_for_overlap_with_one_another(tmp_path: Path) -> None:
    named = name_texts(tmp_path)["text"]
    copy = write_rows(tmp_path / "copy.jsonl", [{"text": f"{prose(500_000, 30)} {prose(0, 2500)}"}])
    with pytest.raises(UserError, match=r"^the prose calibration and copy calibration texts overlap \(\d+ runs of 64"):
        cut_windows(tiny_settings("any", text=named | {"copy": copy}), make_tiny_tokenizer())


def test_too_short_a_text_is_named(tmp_path: Path) -> None:
    named = name_texts(tmp_path)["text"]
    short = write_rows(tmp_path / "short.jsonl", [{"text": prose(0, 3)}])
    sentence = (
        f"text source {short!r} is too short: 4 sql calibration + 3 sql validation + 2 sql test windows of 64 tokens "
        "need 576 tokens, but it has "
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        check_windows(tiny_settings("any", text=named | {"sql": short}), make_tiny_tokenizer())


def test_each_text_that_the_model_writes_has_prompts_of_its_own_for_every_split() -> None:
    settings = tiny_settings("any", text={"code": "self:A | B | C | D", "free": "self", "doc": "pydoc"})
    assert deal_prompts(settings) == {
        **{"code calibration": ["A", "B"], "code validation": ["C"], "code test": ["D"]},
        **{"free calibration": [], "free validation": [], "free test": []},
    }
    assert list_written(settings) == {
        **{"code calibration": 4, "code validation": 3, "code test": 2},
        **{"free calibration": 4, "free validation": 3, "free test": 2},
    }
    check_texts(settings)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            {"a": "self:A | B"},
            "the a calibration and a validation and a test texts come from 2 prompts of one source, 'self:A | B': ",
        ),
        (
            {"a": "self:A | B | C", "b": "self:D | E | A"},
            "the a calibration and b test texts come from the same prompt, 'A'; give each its own",
        ),
        ({"a": "selfish"}, "text source 'selfish' is not one of hub:NAME"),
    ],
)
def test_bad_sources_are_refused_before_anything_is_loaded(text: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        check_texts(tiny_settings("any", text=text))


def test_what_is_written_is_asked_for_part_by_part() -> None:
    asked: list[tuple[str, list[str], int]] = []

    def write(part: str, prompts: list[str], tokens: int) -> list[int]:
        asked.append((part, prompts, tokens))
        return list(range(1000 * len(asked), 1000 * len(asked) + tokens))

    settings = tiny_settings("any", text={"a": "self:A | B | C", "doc": "pydoc"})
    windows = cut_windows(settings, make_tiny_tokenizer(), write)
    assert asked == [
        *[("a calibration", ["A"], 4 * 64), ("a validation", ["B"], 3 * 64), ("a test", ["C"], 2 * 64)],
    ]
    assert windows.calibration[3, -1] == 1000 + 4 * 64 - 1
