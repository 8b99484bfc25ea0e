"""A key goes where it belongs and nowhere else, whatever the environment and an endpoint say."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from graph.config import RunConfig
from graph.llm.ask import ask
from graph.llm.keys import Key, find_openai, is_loopback, name_variable, read_key
from graph.llm.ladder import AgentError
from graph.llm.models import check_model, open_model
from graph.planning.plan import Plan
from tests.graph.llm.asking import KEY, PLAN, QUESTION
from tests.openai_server import OpenAIServer
from tools.base.errors import UserError
from tools.base.secrets import redact

OWN = "an-endpoint's-own-key"
AMBIENT = {
    "OPENAI_API_KEY": KEY,
    "OPENAI_ADMIN_KEY": "sk-admin-secret",
    "OPENAI_ORG_ID": "org-secret",
    "OPENAI_ORGANIZATION": "org-secret",
    "OPENAI_PROJECT_ID": "proj-secret",
    "OPENAI_CUSTOM_HEADERS": "Authorization: Bearer custom-secret\nX-Api-Key: custom-secret",
    "OPENAI_BASE_URL": "https://elsewhere.example/secret",
    "OPENAI_API_BASE": "https://elsewhere.example/secret",
    "OPENAI_PROXY": "http://127.0.0.1:9/secret",
    "LANGSMITH_GATEWAY": "https://gateway.example/secret",
    "LANGSMITH_GATEWAY_API_KEY": "gateway-secret",
    "LANGSMITH_API_KEY": "gateway-secret",
    "HTTP_PROXY": "http://127.0.0.1:9",
}
"""Whatever LangChain, OpenAI's client and their HTTP client read from the environment."""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, unknown_endpoints: None) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("BILLHOOK_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


def ask_server(server: OpenAIServer, name: str = "good") -> Plan:
    return ask(open_model(server.planner(name), RunConfig(agent_retries=0)), Plan, QUESTION)


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({}, ""),
        ({"BILLHOOK_API_KEY": OWN}, OWN),
        ({"BILLHOOK_127_0_0_1_API_KEY": OWN}, OWN),
        ({"BILLHOOK_127_0_0_1_API_KEY": OWN, "BILLHOOK_API_KEY": "another's"}, OWN),
        ({"BILLHOOK_127_0_0_1_API_KEY": "", "BILLHOOK_API_KEY": "another's"}, ""),
        ({"BILLHOOK_API_KEY": f"  {OWN}\n"}, OWN),
    ],
)
def test_an_address_gets_its_own_key_or_none(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sent: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ask_server(server) == PLAN
    assert [request.key for request in server.requests] == [sent]


@pytest.mark.parametrize("own", ["", OWN])
@pytest.mark.parametrize("name", ["good", "bare"])
def test_nothing_of_the_environment_reaches_another_address(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, name: str, own: str
) -> None:
    for variable, value in AMBIENT.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("NO_PROXY")
    if own:
        monkeypatch.setenv("BILLHOOK_API_KEY", own)
    assert ask_server(server, name) == PLAN
    assert len(server.requests) == (4 if name == "bare" else 1), "every rung of the ladder"
    for request in server.requests:
        sent = json.dumps([request.path, request.headers, request.body])
        assert "secret" not in sent and "sk-" not in sent
        expected = {"accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}
        named = {header for header in request.headers if not header.startswith("x-stainless-")}
        assert named == expected | ({"authorization"} if own else set())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("BILLHOOK_API_KEY", OWN)
    arrived: list[str] = []

    class Redirect(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("location", f"{server.url}/chat/completions")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Redirect) as other:
        threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        planner = f"openai:good@http://127.0.0.1:{other.server_port}/v1"
        with pytest.raises(AgentError) as caught:
            ask(open_model(planner, RunConfig()), Plan, QUESTION)
        other.shutdown()
    assert str(caught.value) == (
        f"openai:good at http://127.0.0.1:{other.server_port}/v1 sends calls on to another address (HTTP {status}), "
        "which none is sent to; name that one, after 1 request"
    )
    assert arrived == ["/v1/chat/completions"] and not server.requests


@pytest.mark.parametrize("variable", ["BILLHOOK_API_KEY", "BILLHOOK_GPU_7_LAN_API_KEY"])
def test_a_key_over_plain_http_is_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    spec = "openai:m@http://gpu-7.lan:8000/v1"
    check_model(spec)
    monkeypatch.setenv(variable, OWN)
    for use in (check_model, lambda spec: open_model(spec, RunConfig())):
        with pytest.raises(UserError) as caught:
            use(spec)
        assert str(caught.value) == (
            f"{spec} would get the key in {variable} over plain http, where anybody on the way can read it; use https "
            "or a tunnel to 127.0.0.1, or set BILLHOOK_GPU_7_LAN_API_KEY to nothing if it needs no key"
        )
    check_model("openai:m@https://gpu-7.lan:8000/v1")
    monkeypatch.setenv("BILLHOOK_GPU_7_LAN_API_KEY", "")
    check_model(spec)


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.8.9.1", True),
        ("http://localhost:1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://model.localhost", True),
        ("http://0.0.0.0:8000", False),
        ("http://192.168.1.2", False),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://2130706433", False),  # 127.0.0.1 to some programs, something else to others
        ("http://[::]", False),
    ],
)
def test_loopback(address: str, here: bool) -> None:
    assert is_loopback(address) == here


@pytest.mark.parametrize(
    ("address", "variable"),
    [
        ("https://openrouter.ai/api/v1", "BILLHOOK_OPENROUTER_AI_API_KEY"),
        ("http://127.0.0.1:8000/v1", "BILLHOOK_127_0_0_1_API_KEY"),
        ("https://a-b.example:444", "BILLHOOK_A_B_EXAMPLE_API_KEY"),
        ("http://[::1]:8000/v1", "BILLHOOK_1_API_KEY"),
    ],
)
def test_every_address_has_a_variable_that_is_a_secret(
    address: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name_variable(address) == variable
    monkeypatch.setenv(variable, OWN)
    assert read_key(address) == Key(variable, OWN)
    assert redact(f"said {OWN}") == "said [key]"


# OpenAI itself


def test_openai_gets_its_own_key_and_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLHOOK_API_KEY", OWN)
    monkeypatch.setenv("LANGSMITH_GATEWAY", "true")
    model = open_model("openai:gpt-5.1", RunConfig())
    client = model.root_client  # type: ignore[attr-defined]
    assert (str(client.base_url), client.api_key) == ("https://api.openai.com/v1/", KEY)
    assert not model.elsewhere  # type: ignore[attr-defined]
    assert not client._client.follow_redirects


def test_openai_named_as_an_address_is_like_any_other() -> None:
    assert read_key("https://api.openai.com/v1") == Key("BILLHOOK_API_OPENAI_COM_API_KEY", "")


@pytest.mark.parametrize("variable", ["OPENAI_BASE_URL", "OPENAI_API_BASE"])
@pytest.mark.parametrize(
    ("address", "taken"),
    [
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com/v1", True),
        ("https://api.openai.com:443/v1", True),
        ("http://api.openai.com/v1", False),
        ("https://api.openai.com:8443/v1", False),
        ("https://api.openai.com.example.org/v1", False),
        ("https://myapi.openai.com/v1", False),
        ("https://me@api.openai.com/v1", False),
        ("https://gateway.example/v1", False),
    ],
)
def test_an_address_in_the_environment_gets_openais_key_only_if_it_is_openais(
    address: str, taken: bool, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, address)
    if taken:
        check_model("openai:gpt-5.1")
        assert find_openai("openai:gpt-5.1") == address
        return
    for use in (check_model, lambda spec: open_model(spec, RunConfig())):
        with pytest.raises(UserError) as caught:
            use("openai:gpt-5.1")
        shown = redact(address)
        assert str(caught.value) == (
            f"openai:gpt-5.1 is OpenAI's, but {variable} names {shown!r}, which is not sent OPENAI_API_KEY: write "
            f"openai:gpt-5.1@{shown} and set {name_variable(address)} to its key, or unset {variable}"
        )


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (OWN, "wants another API key than BILLHOOK_API_KEY holds (HTTP 401), after 1 request"),
        ("", "wants an API key: set BILLHOOK_127_0_0_1_API_KEY or BILLHOOK_API_KEY (HTTP 401), after 1 request"),
    ],
)
def test_an_endpoint_that_wants_a_key_says_where_it_goes(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, own: str, said: str
) -> None:
    if own:
        monkeypatch.setenv("BILLHOOK_API_KEY", own)
    with pytest.raises(AgentError) as caught:
        ask_server(server, "unauthorized")
    assert str(caught.value) == f"openai:unauthorized at {server.url} {said}"
