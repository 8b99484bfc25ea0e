"""Calibration texts with questions in them."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.rows import prose, write_questions, write_rows, write_splits
from tests.tiny import make_tiny_tokenizer, tiny_settings
from tools.base.errors import UserError
from tools.texts.questions import split_questions, write_pair
from tools.texts.windows import Windows, cut_windows


def test_a_share_of_the_calibration_windows_is_made_of_questions(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    source = write_questions(tmp_path / "qa.jsonl", 200)
    plain = cut_windows(tiny_settings("any", calibration_windows=8, gradient_windows=4), tokenizer)
    mixed = cut_windows(
        tiny_settings(
            "any", calibration_windows=8, gradient_windows=4, questions=source, question_pairs=10, calibration_mix=0.25
        ),
        tokenizer,
    )
    assert mixed.calibration.shape == plain.calibration.shape
    asked = ["Question:" in tokenizer.decode(ids) for ids in mixed.calibration.tolist()]
    assert asked == [False, False, False, True] * 2
    assert mixed.calibration[:3].equal(plain.calibration[:3]) and mixed.calibration[4:7].equal(plain.calibration[3:6])
    text = tokenizer.decode(mixed.calibration[3].tolist())
    assert text.startswith(f"Question: {prose(7 * 20, 5)}? Answer: {prose(9020, 1)}".replace("? Answer", "?\nAnswer"))


def test_before_the_runs_text_lie_as_many_windows_of_questions(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    sources = write_splits(tmp_path, "", ())
    common = {"calibration_windows": 8, "questions": write_questions(tmp_path / "qa.jsonl", 200), "question_pairs": 10}

    def cut(mix: float, **fields: Any) -> Windows:
        return cut_windows(tiny_settings("any", **sources, **common | fields, calibration_mix=mix), tokenizer)

    first_BT = cut(1.0, calibration_windows=16).calibration
    for windows, own in ((cut(0), 0), (cut(0.25), 2), (cut(1.0), 8)):
        (both_BT,) = windows.mixed.values()
        questions_BT = first_BT[own : own + 8]
        assert len({tuple(ids) for ids in both_BT.tolist()}) == 16, "no window twice"
        assert windows.find_text("questions") is both_BT and windows.find_text("run") is windows.calibration
        assert both_BT[:8].equal(questions_BT) and both_BT[8:].equal(windows.calibration)
        assert windows.list_shares({"run": 0.75, "questions": 0.25}, "questions") == {
            **dict.fromkeys(range(8), 0.25),
            **dict.fromkeys(range(8, 16), 0.75),
        }
        assert list(windows.list_shares({"run": 0.0, "questions": 1.0}, "questions")) == list(range(8))
        assert windows.list_shares({}) == dict.fromkeys(range(8), 1.0)


def test_of_questions_alone_no_window_of_the_calibration_text_is_cut(tmp_path: Path) -> None:
    tokenizer, sources = make_tiny_tokenizer(), write_splits(tmp_path, "", ())
    asked = {"calibration_windows": 8, "questions": write_questions(tmp_path / "qa.jsonl", 200), "question_pairs": 10}
    one, spread = (
        cut_windows(tiny_settings("any", **sources, **asked, calibration_mix=1.0, text_spread=spread), tokenizer)
        for spread in (1, 0)
    )
    assert one.calibration.equal(spread.calibration), "questions are not spread"
    assert all("Question:" in tokenizer.decode(ids) for ids in spread.calibration.tolist())


def test_a_text_that_nobody_asked_for_is_left_out_where_it_cannot_be(tmp_path: Path) -> None:
    tokenizer, lines = make_tiny_tokenizer(), {"calibration_windows": 8, "question_pairs": 10}
    few = write_questions(tmp_path / "few.jsonl", 26)
    assert cut_windows(tiny_settings("any", **lines, questions=few), tokenizer).mixed == {}

    many = write_questions(tmp_path / "many.jsonl", 60)
    pairs = [write_pair(pair) for pair in islice(split_questions(many, 10).rest, 3, 7)]
    validation = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in (*pairs, prose(5000, 900))])
    settings = tiny_settings("any", **lines, questions=many, validation=validation)
    assert list(cut_windows(tiny_settings("any", **lines, questions=many), tokenizer).mixed) == ["questions"]
    assert cut_windows(settings, tokenizer).mixed == {}
    with pytest.raises(UserError, match="the calibration and validation texts overlap"):
        cut_windows(settings.model_copy(update={"calibration_mix": 0.5}), tokenizer)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"calibration_mix": 0.5}, "calibration_mix needs questions to mix in"),
        (
            {"calibration_mix": 0.1, "questions": "hub:a/b:train", "calibration_windows": 4},
            "calibration_mix 0.1 of 4 calibration windows is less than one window",
        ),
    ],
)
def test_a_mix_of_nothing_is_refused(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        tiny_settings("any", **fields)
