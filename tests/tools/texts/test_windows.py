"""The cutting of texts into three disjoint splits."""

import copy
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rows import prose, write_questions, write_rows, write_splits
from tests.tiny import make_beginning_tokenizer, make_tiny_tokenizer, tiny_settings
from tools.base.errors import SharedText, UserError
from tools.base.settings import MOST_SPREAD
from tools.texts.sources import read_documents
from tools.texts.windows import (
    CHARACTERS,
    SPLITS,
    _read_tokens,
    check_texts,
    check_windows,
    cut_windows,
    find_bos,
    spread_windows,
)


def test_one_source_is_cut_into_consecutive_disjoint_parts() -> None:
    tokenizer = make_tiny_tokenizer()
    windows = cut_windows(tiny_settings("any"), tokenizer)
    assert [tuple(part.shape) for part in windows[:3]] == [(4, 64), (3, 64), (2, 64)]
    assert windows.mixed == {}
    assert all(part.dtype == torch.int64 for part in windows[:3])
    ids = torch.cat([part.flatten() for part in windows[:3]])
    text = "".join(document.strip() + "\n\n" for document in read_documents("pydoc"))[:5000]
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][: len(ids)]


def test_different_sources_and_one_that_two_splits_share(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 2000))
    (tmp_path / "b.txt").write_text(prose(5000, 2000))
    shared, other = f"file:{tmp_path / 'a.txt'}", f"file:{tmp_path / 'b.txt'}"
    windows = cut_windows(
        tiny_settings("any", calibration=shared, validation=other, test=shared), make_tiny_tokenizer()
    )
    decode = make_tiny_tokenizer().decode
    a, b = prose(0, 2000), prose(5000, 2000)
    assert a.startswith(decode(torch.cat([windows.calibration, windows.test]).flatten().tolist()))
    assert b.startswith(decode(windows.validation.flatten().tolist()))


def test_windows_begin_with_the_token_that_the_tokenizer_begins_a_text_with(tmp_path: Path) -> None:
    source = write_questions(tmp_path / "qa.jsonl", 300)
    settings = tiny_settings("any", questions=source, question_pairs=2, calibration_windows=8)
    begun, plain = (cut_windows(settings, make()) for make in (make_beginning_tokenizer, make_tiny_tokenizer))
    assert (begun.lead, plain.lead) == (1, 0)
    assert list(begun.mixed) == list(plain.mixed) == ["questions"]
    for ours, text in zip([*begun[:3], *begun.mixed.values()], [*plain[:3], *plain.mixed.values()], strict=True):
        assert ours.dtype == torch.int64 and ours.shape == (len(text), 65)
        assert set(ours[:, 0].tolist()) == {make_beginning_tokenizer().bos_token_id}
        assert torch.equal(ours[:, 1:], text), "as much text as without"
    never = cut_windows(settings.model_copy(update={"bos": "never"}), make_beginning_tokenizer())
    assert never.lead == 0
    assert all(torch.equal(ours, text) for ours, text in zip(never[:3], plain[:3], strict=True))


def test_parts_of_a_text_are_spread_over_it_and_nested() -> None:
    assert [spread_windows(count, 8) for count in range(9)] == [
        *([], [0], [0, 4], [0, 2, 4], [0, 2, 4, 6]),
        *([0, 1, 2, 4, 6], [0, 1, 2, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], list(range(8))),
    ]
    assert spread_windows(2, 3) == [0, 2] and spread_windows(1, 1) == spread_windows(9, 1) == [0]
    for total in range(2, 70):
        parts = [spread_windows(count, total) for count in range(1, total + 1)]
        assert all(set(fewer) < set(more) for fewer, more in pairwise(parts)), "nested"
        assert parts[-(-total // 2) - 1] == list(range(0, total, 2)), "half of them are every other one"
        gaps = [max(b - a for a, b in pairwise([*part, total])) for part in parts]
        assert all(gap < 4 * total / count for count, gap in enumerate(gaps, 1)), "no stretch is passed over"


def test_a_tokenizer_is_asked_by_calling_it() -> None:
    assert find_bos(make_beginning_tokenizer()) == make_beginning_tokenizer().bos_token_id
    assert find_bos(make_tiny_tokenizer()) is None and make_tiny_tokenizer().bos_token_id == 0
    other = copy.deepcopy(make_beginning_tokenizer())
    other.bos_token = None
    assert find_bos(other) is None, "what it begins with is no beginning-of-sequence token"


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in (" \n", f"  {prose(0, 900)}\n", "")])
    settings = tiny_settings("any", calibration=source, validation=source, test=source)
    ids = cut_windows(settings, make_tiny_tokenizer()).calibration[0].tolist()
    assert prose(0, 900).startswith(make_tiny_tokenizer().decode(ids))


def test_too_short_a_text_says_what_was_needed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "short.jsonl", [{"text": "a b c"}])
    settings = tiny_settings("any", validation=source, test=source)
    with pytest.raises(UserError) as refusal:
        cut_windows(settings, make_tiny_tokenizer())
    needed = "3 validation + 2 test windows of 64 tokens need 320 tokens"
    assert re.fullmatch(
        re.escape(f"text source {source!r} is too short: {needed}, ")
        + r"but it has \d; ask for fewer or shorter windows",
        str(refusal.value),
    )


def test_what_is_read_is_checked_without_the_model_that_writes_the_rest(tmp_path: Path) -> None:
    settings, tokenizer = tiny_settings("any", calibration="self", validation="self"), make_tiny_tokenizer()
    check_windows(settings, tokenizer)
    source = write_rows(tmp_path / "short.jsonl", [{"text": "a b c"}])
    with pytest.raises(UserError, match="is too short: 2 test windows of 64 tokens need 128 tokens"):
        check_windows(settings.model_copy(update={"test": source}), tokenizer)


def test_texts_that_the_model_writes_must_be_disjoint_too() -> None:
    settings, tokenizer = tiny_settings("any", calibration="self", test="self"), make_tiny_tokenizer()
    asked: list[tuple[str, list[str], int]] = []

    def write(split: str, prompts: Any, tokens: int) -> list[int]:
        asked.append((split, list(prompts), tokens))
        return [i % 300 for i in range(tokens + 9)]

    with pytest.raises(UserError, match=r"the calibration and test texts overlap \(65 runs of 64 tokens"):
        cut_windows(settings, tokenizer, write)
    assert asked == [("calibration", [], 256), ("test", [], 128)]


def test_pydoc_too_short() -> None:
    with pytest.raises(UserError, match=r"text source 'pydoc' is too short: 65536 calibration \+ 3 validation"):
        cut_windows(tiny_settings("any", calibration_windows=65536), make_tiny_tokenizer())


def test_a_later_cut_is_the_stretch_behind_and_the_first_is_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 2000))
    shared = tiny_settings("any", calibration=(source := f"file:{tmp_path / 'a.txt'}"), test=source)
    tokenizer = make_tiny_tokenizer()
    first, second = (
        cut_windows(shared.model_copy(update={"text_cut": cut}), tokenizer) for cut in range(2)
    )  # six windows of the file, and three of Python's reference
    assert all(map(torch.equal, first[:3], cut_windows(shared, tokenizer)[:3]))
    ids = tokenizer(prose(0, 2000) + "\n\n", add_special_tokens=False)["input_ids"]
    cut = torch.cat([first.calibration, first.test, second.calibration, second.test]).flatten()
    assert cut.tolist() == ids[: 2 * 6 * 64]
    text = "".join(document.strip() + "\n\n" for document in read_documents("pydoc"))[:5000]
    prefix = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert torch.cat([first.validation, second.validation]).flatten().tolist() == prefix[: 2 * 3 * 64]


def test_one_window_of_every_few_is_taken_and_each_cut_has_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 6000))
    shared = tiny_settings("any", calibration=(source := f"file:{tmp_path / 'a.txt'}"), test=source, text_spread=3)
    tokenizer = make_tiny_tokenizer()
    ids = torch.tensor(tokenizer(prose(0, 6000) + "\n\n", add_special_tokens=False)["input_ids"][: 2 * 3 * 6 * 64])
    for cut, windows in enumerate(ids.view(2, 6, 3, 64).transpose(1, 2).flatten(0, 1)):
        found = cut_windows(shared.model_copy(update={"text_cut": cut}), tokenizer)
        assert torch.equal(torch.cat([found.calibration, found.test]), windows)
        assert all(part.is_contiguous() for part in found[:3])


@pytest.mark.parametrize(("words", "spread"), [(25, 1), (40, 2), (200, 14), (4000, MOST_SPREAD)])
def test_windows_are_as_far_apart_as_the_source_has_room_for(words: int, spread: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, words))
    tokenizer, source = make_tiny_tokenizer(), f"file:{tmp_path / 'a.txt'}"
    ids = torch.tensor(tokenizer(prose(0, words) + "\n\n", add_special_tokens=False)["input_ids"])
    assert min(len(ids) // 48, MOST_SPREAD) == spread
    shared = tiny_settings("any", calibration=source, test=source, window=8, text_spread=0)
    for cut in {0, spread - 1}:
        found = cut_windows(shared.model_copy(update={"text_cut": cut}), tokenizer)
        wanted = ids[: 48 * spread].view(6, spread, 8)[:, cut]
        assert torch.equal(torch.cat([found.calibration, found.test]), wanted)


def test_cuts_beyond_those_that_a_source_has_room_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 40))
    shared = tiny_settings("any", test=(source := f"file:{tmp_path / 'a.txt'}"), window=8, text_spread=0)
    tokenizer = make_tiny_tokenizer()
    fits = len(tokenizer(prose(0, 40) + "\n\n", add_special_tokens=False)["input_ids"]) // 16
    cut_windows(shared.model_copy(update={"text_cut": fits - 1}), tokenizer)
    message = f"{source!r} is too short: 2 test windows of 8 tokens need 16 tokens behind {16 * fits} that --text-cut"
    with pytest.raises(UserError, match=re.escape(message)):
        cut_windows(shared.model_copy(update={"text_cut": fits}), tokenizer)


@pytest.mark.parametrize(
    ("change", "needed", "instead"),
    [
        ({"text_spread": 40}, ", one of every 40, need 5120 tokens", "a smaller --text-spread"),
        ({"text_cut": 9}, " need 128 tokens behind 1152 that --text-cut 9 passes over", "an earlier cut"),
    ],
)
def test_too_short_a_text_for_a_later_cut_or_a_spread_says_so(
    change: dict[str, int], needed: str, instead: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 300))
    source = f"file:{tmp_path / 'a.txt'}"
    with pytest.raises(UserError) as refusal:
        cut_windows(tiny_settings("any", test=source, **change), make_tiny_tokenizer())
    assert re.fullmatch(
        re.escape(f"text source {source!r} is too short: 2 test windows of 64 tokens{needed}, but it has ")
        + rf"\d+; ask for fewer or shorter windows, or {instead}",
        str(refusal.value),
    )


def test_sources_that_share_text_between_their_windows_are_refused_but_for_boilerplate(tmp_path: Path) -> None:
    licence = prose(17_000, 25)
    for name, text in {
        "whole": f"{prose(0, 3000)} {licence} {prose(3000, 3000)}",
        "later": f"{prose(2, 5998)}",
        "other": f"{prose(8000, 900)} {licence} {prose(9000, 5000)}",
    }.items():
        (tmp_path / f"{name}.txt").write_text(text)
    whole, later, other = (f"file:{tmp_path / f'{name}.txt'}" for name in ("whole", "later", "other"))
    tokenizer, shared = make_tiny_tokenizer(), tiny_settings("any", calibration=whole, text_spread=0)
    found = cut_windows(shared.model_copy(update={"test": other}), tokenizer)
    words = tokenizer.decode(torch.cat([found.calibration, found.test]).flatten().tolist())
    assert licence[:60] not in words, "no window has it"
    settings = shared.model_copy(update={"test": later})
    for cut in (cut_windows, check_windows):
        with pytest.raises(SharedText, match=r"^the calibration and test texts overlap \(\d{4} runs of 64 tokens, "):
            cut(settings, tokenizer)


def test_a_short_source_that_stands_whole_in_a_long_one_is_refused(tmp_path: Path) -> None:
    """Of the long one it is no hundredth."""
    short, long = f"file:{tmp_path / 'short.txt'}", f"file:{tmp_path / 'long.txt'}"
    (tmp_path / "short.txt").write_text(prose(0, 70))
    (tmp_path / "long.txt").write_text(f"{prose(1000, 4000)} {prose(0, 70)} {prose(5000, 4000)}")
    small = {"window": 64, "calibration_windows": 1, "validation_windows": 100, "test_windows": 1, "text_spread": 0}
    settings = tiny_settings("any", calibration=short, validation=long, test=long, gradient_windows=1, **small)
    with pytest.raises(SharedText, match=r"^the calibration and validation texts overlap \(\d+ runs of 64 tokens, "):
        cut_windows(settings, make_tiny_tokenizer())


@pytest.mark.parametrize("second", ["validation", "test"])
def test_text_in_two_splits_is_refused(tmp_path: Path, second: str) -> None:
    common = prose(13_000, 32)
    sources = write_splits(tmp_path, common, ("calibration", second))
    with pytest.raises(UserError) as refusal:
        cut_windows(tiny_settings("any", **sources), make_tiny_tokenizer())
    sentence = str(refusal.value)
    assert re.match(rf"the calibration and {second} texts overlap \(\d+ runs of 64 tokens, such as '", sentence)
    assert sentence.endswith("); choose disjoint texts")
    quoted = sentence.split("'")[1]
    assert " ".join(quoted.split()[1:-1]) in common
    assert "\n" not in sentence


def test_a_shorter_common_run_is_no_overlap(tmp_path: Path) -> None:
    common = prose(13_000, 12)
    assert len(make_tiny_tokenizer()(common)["input_ids"]) < 60
    cut_windows(tiny_settings("any", **write_splits(tmp_path, common, SPLITS)), make_tiny_tokenizer())


def test_the_same_file_under_two_names_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose(0, 2000))
    settings = tiny_settings("any", validation=f"file:{tmp_path / 'a.txt'}", test=f"file:{tmp_path / 'b.txt'}")
    with pytest.raises(UserError, match="the validation and test texts overlap"):
        cut_windows(settings, make_tiny_tokenizer())


def test_splits_shorter_than_a_shingle_are_compared_whole(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose(0, 2000))
    sources = {"validation": f"file:{tmp_path / 'a.txt'}", "test": f"file:{tmp_path / 'b.txt'}"}
    with pytest.raises(UserError, match="1 runs of 16 tokens"):
        cut_windows(tiny_settings("any", window=8, **sources), make_tiny_tokenizer())


def test_questions_that_are_a_text_are_refused(tmp_path: Path) -> None:
    source = write_questions(tmp_path / "qa.jsonl", 40)
    with pytest.raises(UserError, match="the questions and the calibration text are the same"):
        check_texts(tiny_settings("any", questions=source, calibration=source))


def test_of_a_long_text_no_more_is_read_than_windows_take(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = make_tiny_tokenizer(), list[int]()
    text = " ".join(f"word{number % 977} of {number}," for number in range(60_000))
    whole = tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]

    def read(part: str, **options: Any) -> Any:
        seen.append(len(part))
        return tokenizer(part, **options)

    for needed in (64, 1000, 20_000, len(whole) + 1):
        ids = list(_read_tokens(iter([text]), read, needed))
        assert len(ids) >= min(needed, len(whole)) and ids == whole[: len(ids)]
    assert seen[0] == 64 * CHARACTERS and max(seen[:-2]) < len(text), "all of it only where all of it is wanted"
    assert ids == whole
