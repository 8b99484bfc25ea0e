"""Who is let in: the rule for `Host` and `Origin`, and that every server of ours goes by it."""

import json
from typing import Any

import httpx
import pytest

from graph import studio
from graph.doors import CLOSED, FOREIGN_HOST, FOREIGN_ORIGIN, LOOPBACK_ORIGIN, STUDIO, judge
from tests.hub_server import HubServer
from tests.openai_server import OpenAIServer

HOST, ORIGIN, NOTHING = (400, FOREIGN_HOST), (403, FOREIGN_ORIGIN), (0, "")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:2024", "localhost", "LocalHost:80", "[::1]:2024", "[::1]"])
def test_names_of_this_machine(host: str) -> None:
    assert judge([host], []) == NOTHING


@pytest.mark.parametrize(
    "hosts",
    [
        *([], [""], ["evil.example"], ["127.0.0.1.evil.example:2024"], ["127.0.0.1:evil"], ["localhost."], ["0.0.0.0"]),
        *(["192.168.1.7:2024"], ["127.0.0.1@evil.example"], ["127.0.0.1", "evil.example"], ["127.0.0.1\n"], ["::1"]),
    ],
)
def test_other_names(hosts: list[str]) -> None:
    assert judge(hosts, []) == HOST
    assert judge(hosts, [STUDIO], [STUDIO]) == HOST


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:2024", "127.0.0.1:2024"),
        ("http://localhost:2024", "127.0.0.1:2024"),
        ("https://[::1]:2024", "localhost:2024"),
        ("http://127.0.0.1", "localhost"),
        (STUDIO, "127.0.0.1:2024"),
    ],
)
def test_origins_that_are_let_in(origin: str, host: str) -> None:
    assert judge([host], [origin], [STUDIO]) == NOTHING
    assert judge([host], [origin]) == (ORIGIN if origin == STUDIO else NOTHING)


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "null", "", "http://127.0.0.1:3000", "http://127.0.0.1", "http://127.0.0.1:20240"),
        *("http://smith.langchain.com", f"{STUDIO}.evil.example", f"{STUDIO}:444", "https://eu.smith.langchain.com"),
        *("http://127.0.0.1:2024.evil.example", "http://127.0.0.1:2024@evil.example", "file://", "127.0.0.1:2024"),
    ],
)
def test_origins_that_are_not(origin: str) -> None:
    assert judge(["127.0.0.1:2024"], [origin], [STUDIO]) == ORIGIN
    assert judge(["127.0.0.1:2024"], [STUDIO, origin], [STUDIO]) == ORIGIN


def test_langgraph_json_has_the_same_doors() -> None:
    http: dict[str, Any] = json.loads((studio.ROOT / "langgraph.json").read_text())["http"]
    assert http["app"] == "graph.doors:app"
    assert http["cors"]["allow_origins"] == [STUDIO]
    assert http["cors"]["allow_origin_regex"] == LOOPBACK_ORIGIN
    assert "allow_credentials" not in http["cors"]
    # What would call addresses that a caller names, or speaks other protocols than Studio's.
    assert {name for name, value in http.items() if value is True} == {
        *("disable_webhooks", "disable_mcp", "disable_a2a", "disable_ui")
    }
    assert CLOSED == ("/deploy", "/internal")


@pytest.mark.parametrize("kind", [OpenAIServer, HubServer])
def test_servers_of_tests_stay_on_this_machine(kind: Any) -> None:
    with kind() as server:
        assert server.url.startswith("http://127.0.0.1:")
        for headers, refusal in (({"Host": "evil.example"}, HOST), ({"Origin": "http://evil.example"}, ORIGIN)):
            answer = httpx.post(f"{server.url}/x", json={"model": "x"}, headers=headers, trust_env=False)
            assert (answer.status_code, answer.text) == refusal
        assert server.requests == []
