"""Text from every kind of source, and its cutting into three disjoint splits."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_tiny_tokenizer, tiny_settings
from tools.base.errors import UserError
from tools.texts.questions import split_questions, write_pair
from tools.texts.windows import SPLITS, Windows, check_source, check_texts, cut_windows, read_documents


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"file:{path}"


# --- sources -------------------------------------------------------------------------------------------------------


def test_pydoc_is_prose_without_repeated_paragraphs() -> None:
    documents = list(read_documents("pydoc"))
    assert sum(map(len, documents)) > 200_000
    paragraphs = [" ".join(p.split()) for document in documents for p in document.split("\n\n") if p.strip()]
    assert len(paragraphs) == len(set(paragraphs))
    assert documents == list(read_documents("pydoc"))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "odd [1] *.txt"  # datasets would take this name for a pattern
    path.write_text("One line, café.\n\nAnother paragraph.\n", encoding="utf-8")
    assert list(read_documents(f"file:{path}")) == ["One line, café.\n\nAnother paragraph.\n"]


@pytest.mark.parametrize(
    ("rows", "documents"),
    [
        ([{"text": "one", "id": 1}, {"text": "two", "id": 2}], ["one", "two"]),
        ([{"content": "one"}], ["one"]),
        ([{"document": "one"}], ["one"]),
        ([{"text": None}, {"text": "two"}], ["", "two"]),
        ([{"question": "why?", "answer": "so."}], ["Question: why?\nAnswer: so."]),
    ],
)
def test_rows_of_a_jsonl_file(tmp_path: Path, rows: list[Any], documents: list[str]) -> None:
    assert list(read_documents(write_rows(tmp_path / "rows.jsonl", *rows))) == documents


def test_rows_without_text_are_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", {"b": 1, "a": "x"})
    sentence = f"text source {source!r} has no text in a column text, content or document, but ['a', 'b']"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        list(read_documents(source))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("broken.jsonl", b'{"text": "one"}\n{"text":\n', "could not be read: JSON parse error"),
        ("latin.txt", "café".encode("latin-1"), "could not be read: 'utf-8' codec can't decode byte 0xe9"),
        ("empty.txt", b"", "is empty$"),
        ("empty.jsonl", b"", "is empty$"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem) as refusal:
        list(read_documents(f"file:{tmp_path / name}"))
    assert "\n" not in str(refusal.value)


def test_a_data_set_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"^text source 'hub:no/such-data:train' could not be read: Couldn't reach"):
        list(read_documents("hub:no/such-data:train"))


FORMS = "hub:NAME[/CONFIG]:SPLIT, file:PATH (.txt or .jsonl) or pydoc"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("", f"text source '' is not one of {FORMS}"),
        ("wikitext", f"text source 'wikitext' is not one of {FORMS}"),
        ("pydoc ", f"text source 'pydoc ' is not one of {FORMS}"),
        ("file:/no/such.txt", "text file /no/such.txt does not exist"),
        ("file:" + "a" * 300 + ".txt", f"text file {'a' * 300}.txt does not exist"),
        (f"file:{__file__}", f"text file {__file__} must end in .txt or .jsonl"),
        *(
            (
                source,
                f"text source {source!r} is not of the form hub:NAME[/CONFIG]:SPLIT, "
                "such as hub:Salesforce/wikitext/wikitext-2-raw-v1:test",
            )
            for source in ("hub:wikitext", "hub::test", "hub:a/b/c/d:test", "hub:a//b:test", "hub:a b:test", "hub:a/b:")
        ),
    ],
)
def test_bad_sources_are_refused_before_anything_is_loaded(source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        check_source(source)


@pytest.mark.parametrize("source", ["file:~nobody-here/a.txt", "file:~/no-such-file.txt"])
def test_a_home_that_is_not_there(source: str) -> None:
    with pytest.raises(UserError, match=r"does not exist$"):
        check_source(source)


# --- windows -------------------------------------------------------------------------------------------------------


def prose(start: int, words: int) -> str:
    """Words that do not repeat: numbers spelt in letters."""
    numbers = range(start, start + words)
    return " ".join("".join(chr(97 + n // power % 26) for power in (1, 26, 676)) for n in numbers)


def write_with(directory: Path, common: str, splits: tuple[str, ...]) -> dict[str, str]:
    """Sources for the three splits, some with a common text near their beginning."""
    return {
        split: write_rows(
            directory / f"{split}.jsonl",
            {"text": f"{prose(4000 * i, 3)} {common if split in splits else ''} {prose(4000 * i + 1000, 900)}"},
        )
        for i, split in enumerate(SPLITS)
    }


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


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"text": " \n"}, {"text": f"  {prose(0, 900)}\n"}, {"text": ""})
    settings = tiny_settings("any", calibration=source, validation=source, test=source)
    ids = cut_windows(settings, make_tiny_tokenizer()).calibration[0].tolist()
    assert prose(0, 900).startswith(make_tiny_tokenizer().decode(ids))


def test_too_short_a_text_says_what_was_needed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "short.jsonl", {"text": "a b c"})
    settings = tiny_settings("any", validation=source, test=source)
    with pytest.raises(UserError) as refusal:
        cut_windows(settings, make_tiny_tokenizer())
    needed = "3 validation + 2 test windows of 64 tokens need 320 tokens"
    assert re.fullmatch(
        re.escape(f"text source {source!r} is too short: {needed}, ")
        + r"but it has \d; ask for fewer or shorter windows",
        str(refusal.value),
    )


def test_pydoc_too_short() -> None:
    with pytest.raises(UserError, match=r"text source 'pydoc' is too short: 65536 calibration \+ 3 validation"):
        cut_windows(tiny_settings("any", calibration_windows=65536), make_tiny_tokenizer())


@pytest.mark.parametrize("second", ["validation", "test"])
def test_text_in_two_splits_is_refused(tmp_path: Path, second: str) -> None:
    common = prose(13_000, 32)
    sources = write_with(tmp_path, common, ("calibration", second))
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
    cut_windows(tiny_settings("any", **write_with(tmp_path, common, SPLITS)), make_tiny_tokenizer())


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


def write_questions(path: Path, count: int) -> str:
    return write_rows(path, *({"question": f"{prose(7 * i, 5)}?", "answer": prose(9000 + i, 1)} for i in range(count)))


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


def test_recipes_find_the_texts_of_runs_with_more_questions(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    sources = write_with(tmp_path, "", ())
    common = {"calibration_windows": 8, "questions": write_questions(tmp_path / "qa.jsonl", 200), "question_pairs": 10}

    def cut(mix: float, **fields: Any) -> Windows:
        return cut_windows(tiny_settings("any", **sources, **common | fields, calibration_mix=mix), tokenizer)

    plain = cut(0)
    assert list(plain.mixed) == ["quarter", "half"] and list(cut(0.25).mixed) == ["half"] and cut(0.5).mixed == {}
    assert plain.mixed["quarter"].equal(cut(0.25).calibration)
    assert plain.mixed["half"].equal(cut(0.5).calibration)
    assert cut(0.25).mixed["half"].equal(cut(0.5).calibration)
    assert not cut(0, calibration_windows=1).mixed


def test_texts_that_nobody_asked_for_are_left_out_where_they_cannot_be(tmp_path: Path) -> None:
    tokenizer, lines = make_tiny_tokenizer(), {"calibration_windows": 8, "question_pairs": 10}
    few = write_questions(tmp_path / "few.jsonl", 26)
    assert list(cut_windows(tiny_settings("any", **lines, questions=few), tokenizer).mixed) == ["quarter"]

    many = write_questions(tmp_path / "many.jsonl", 60)
    pairs = [write_pair(pair) for pair in islice(split_questions(many, 10).rest, 3, 7)]  # a quarter takes the first 4
    validation = write_rows(tmp_path / "text.jsonl", *({"text": text} for text in (*pairs, prose(5000, 900))))
    settings = tiny_settings("any", **lines, questions=many, validation=validation)
    assert list(cut_windows(settings, tokenizer).mixed) == ["quarter"]
    with pytest.raises(UserError, match="the calibration and validation texts overlap"):
        cut_windows(settings.model_copy(update={"calibration_mix": 0.5}), tokenizer)


def test_questions_that_are_a_text_are_refused(tmp_path: Path) -> None:
    source = write_questions(tmp_path / "qa.jsonl", 40)
    with pytest.raises(UserError, match="the questions and the calibration text are the same"):
        check_texts(tiny_settings("any", questions=source, calibration=source))


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
