"""Names of data sets on the hub."""

import pytest

from tools.base.tables import HubText, parse_hub
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
