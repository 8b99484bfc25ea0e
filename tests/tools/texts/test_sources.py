"""Documents from every kind of source, and what cannot be read."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.hub_server import HubServer
from tests.rows import write_rows
from tools.base.errors import UserError
from tools.base.settings import TEXT_FORMS, TEXT_SOURCE
from tools.texts.sources import SOURCES, check_source, read_documents


def test_every_kind_of_source_has_a_form() -> None:
    assert [form.startswith(kind) for kind, form in zip(SOURCES, TEXT_FORMS, strict=True)] == [True] * len(SOURCES)
    assert TEXT_SOURCE == FORMS


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
    assert list(read_documents(write_rows(tmp_path / "rows.jsonl", rows))) == documents


def test_rows_without_text_are_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"b": 1, "a": "x"}])
    sentence = f"text source {source!r} has no text in a column text, content or document, but ['a', 'b']"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        list(read_documents(source))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("broken.jsonl", b'{"text": "one"}\n{"text":\n', "could not be read: line 2 is no JSON: "),
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
    with pytest.raises(UserError) as refusal:
        list(read_documents("hub:no/such-data:train"))
    assert str(refusal.value) == (
        "data set 'no/such-data' is not on this machine, and the hub is not asked, as HF_HUB_OFFLINE is set"
    )


def test_a_data_set_without_a_network_is_one_line_at_once(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with HubServer() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(UserError) as refusal:
        list(read_documents("hub:no/such-data:train"))
    assert str(refusal.value) == (
        f"data set 'no/such-data' is not on this machine, and {gone.url} cannot be reached ([Errno 111] Connection "
        "refused)"
    )
    assert caplog.messages == []


FORMS = "hub:NAME[/CONFIG]:SPLIT, file:PATH (.txt or .jsonl), pydoc, self or self:PROMPT"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("", f"text source '' is not one of {FORMS}"),
        ("wikitext", f"text source 'wikitext' is not one of {FORMS}"),
        ("pydoc ", f"text source 'pydoc ' is not one of {FORMS}"),
        ("itself", f"text source 'itself' is not one of {FORMS}"),
        ("self: ", "text source 'self: ' has an empty prompt; write self:PROMPT, or self alone for text without one"),
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
