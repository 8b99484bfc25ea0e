"""Every request is admitted before it is sent, bounded, and counted whatever comes of it."""

import json
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from threading import Event
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool

from graph.config import RunConfig
from graph.llm import attempts, endpoint
from graph.llm.ask import CallRecord, ask
from graph.llm.attempts import FailedRequest, count_answer, count_tokens
from graph.llm.ladder import AgentError
from graph.llm.models import open_model
from graph.llm.toolbox import Toolbox
from graph.planning.plan import Plan
from tests.graph.llm.asking import PLAN, QUESTION
from tests.openai_server import DEFAULT_PLAN, OpenAIServer
from tools.base.progress import Stopped, stop_at


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, unknown_endpoints: None) -> None:
    monkeypatch.setattr(endpoint, "_spellings", {})
    monkeypatch.setattr(attempts, "FIRST_WAIT", 0.01)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


class Book:
    """Keeps every request that is admitted and every one that fails."""

    def __init__(self, most: int = 100) -> None:
        self.admitted: list[tuple[int, int]] = []
        self.failed: list[FailedRequest] = []
        self._most = most

    def admit(self, prompt: int, answer: int) -> None:
        if len(self.admitted) == self._most:
            raise AgentError("no more")
        self.admitted.append((prompt, answer))

    def keep_failure(self, failed: FailedRequest) -> None:
        self.failed.append(failed)


def make_toolbox() -> Toolbox:
    @tool
    def look(name: str) -> str:
        """Look at a layer."""
        return name

    return Toolbox(lambda: nullcontext([look]), calls=2, seconds=60)


def ask_server(server: OpenAIServer, name: str, book: Book, toolbox: Toolbox | None = None, **changes: Any) -> Plan:
    config = RunConfig.model_validate({"agent_answer_tokens": 300, **changes})
    return ask(open_model(server.planner(name), config), Plan, QUESTION, meter=book, toolbox=toolbox)


# Counting


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a", 1),
        ("ab", 1),
        ("abc", 2),
        ("7", 1),
        ("1234", 4),
        ("k -13", 4),
        ("é", 1),
        ("日本", 3),
        ("\ud800", 1),
    ],
)
def test_a_token_for_every_digit_and_every_two_other_bytes(text: str, tokens: int) -> None:
    assert count_tokens(text) == tokens


def test_of_an_answer_text_and_calls_are_counted() -> None:
    calls = [{"name": "Plan", "args": {"sparsity": 0.3}, "id": "1"}]
    said = json.dumps([["Plan", {"sparsity": 0.3}]])
    assert count_answer(AIMessage("word")) == 2
    assert count_answer(AIMessage("", tool_calls=calls)) == count_tokens(said)


def test_schemas_and_tools_are_part_of_what_is_sent(server: OpenAIServer) -> None:
    plain, with_tools = Book(), Book()
    ask_server(server, "bare", plain)
    ask_server(server, "good", with_tools, make_toolbox())
    held, called, asked_for_json, text = (prompt for prompt, _ in plain.admitted)
    assert min(held, called) > 20 * text > 0 and text < asked_for_json < held
    assert with_tools.admitted[0][0] > held


# Bounds


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", ["good", "no-response-format", "json-mode-only", "bare", "prose-once", "rate-twice"])
def test_every_request_bounds_its_answer(server: OpenAIServer, name: str, tools: bool) -> None:
    book = Book()
    ask_server(server, name, book, make_toolbox() if tools else None)
    assert server.requests
    assert [request.body.get("max_tokens") for request in server.requests] == [300] * len(server.requests)
    assert not any("max_completion_tokens" in request.body for request in server.requests)
    assert [answer for _, answer in book.admitted] == [300] * len(server.requests)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("gpt-5.1", "max_completion_tokens"), ("o3", "max_completion_tokens"), ("gpt-5-pro", "max_output_tokens")],
)
def test_openai_is_told_the_bound_by_its_own_names(name: str, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    model: Any = open_model(f"openai:{name}", RunConfig(agent_answer_tokens=300))
    payload = model._get_request_payload([HumanMessage("hello")])
    bounds = {key: value for key, value in payload.items() if key.startswith("max_")}
    assert bounds == {bound: 300}


def test_an_endpoint_that_knows_the_bound_by_its_new_name_alone(server: OpenAIServer) -> None:
    book = Book()
    assert ask_server(server, "renamed-bound", book) == PLAN
    assert ask_server(server, "renamed-bound", book) == PLAN
    bounds = [
        {key: value for key, value in request.body.items() if key.startswith("max_")} for request in server.requests
    ]
    assert bounds == [{"max_tokens": 300}, {"max_completion_tokens": 300}, {"max_completion_tokens": 300}]
    assert [request.method for request in server.requests] == ["json_schema"] * 3 and book.failed == []


# Requests that fail


@pytest.mark.parametrize(
    ("name", "paid", "again", "words"),
    [
        ("rate-twice", "prompt", [True, True], "limits the rate or the quota (HTTP 429: slow down)"),
        ("rate-forever", "prompt", [True, True, False], "limits the rate or the quota (HTTP 429: slow down)"),
        ("unavailable", "prompt", [True, True, False], "failed (HTTP 503: overloaded)"),
        ("hang-up", "all", [True, True, False], "cannot be reached or hung up ("),
        ("slow-once", "all", [True], "gave no answer within 0.3 s"),
        ("html", "all", [False], "sent no chat completion (ValueError: "),
        ("unauthorized", "", [], ""),
        ("forbidden", "", [], ""),
        ("not-found", "", [], ""),
        ("bad-request", "", [], ""),
        ("busy-for-long", "", [], ""),
    ],
)
def test_what_may_have_been_paid_for_is_counted(
    server: OpenAIServer, name: str, paid: str, again: list[bool], words: str
) -> None:
    book, records = Book(), list[CallRecord]()
    config = RunConfig(agent_answer_tokens=300, agent_timeout=0.3 if name == "slow-once" else 20)
    model = open_model(server.planner(name), config)
    try:
        ask(model, Plan, QUESTION, meter=book, on_call=records.append)
    except AgentError:
        assert records == []
    else:
        assert len(records) == 1
    assert len(book.admitted) == len(server.requests)
    assert [failed.again for failed in book.failed] == again
    for failed, (prompt, _) in zip(book.failed, book.admitted, strict=False):
        assert (failed.input_tokens, failed.output_tokens) == (prompt, 300 if paid == "all" else 0)
        assert failed.problem.startswith(words)


def test_what_never_left_costs_nothing() -> None:
    book = Book()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        planner = f"openai:m@http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(AgentError, match="refused\\), after 2 requests"):
            ask(open_model(planner, RunConfig(agent_retries=1)), Plan, QUESTION, meter=book)
    assert [(failed.again, failed.input_tokens, failed.output_tokens) for failed in book.failed] == [(True, 0, 0)]


def test_a_request_that_is_not_admitted_is_not_sent(server: OpenAIServer) -> None:
    book = Book(most=1)
    with pytest.raises(AgentError, match=r"^no more$"):
        ask_server(server, "unavailable", book)
    assert len(server.requests) == 1 and [failed.again for failed in book.failed] == [True]


def test_a_wait_ends_when_the_run_is_to_end(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "FIRST_WAIT", 3600.0)
    monkeypatch.setattr(attempts, "LONGEST_BACKOFF", 3600.0)
    asked = Event()

    class Ending(Book):
        def keep_failure(self, failed: FailedRequest) -> None:
            super().keep_failure(failed)
            asked.set()

    book = Ending()
    with stop_at(asked), pytest.raises(Stopped):
        ask_server(server, "hang-up", book)
    assert (len(server.requests), len(book.failed)) == (1, 1)


def test_what_an_endpoint_does_not_tell_is_our_count(server: OpenAIServer) -> None:
    records: list[CallRecord] = []
    book = Book()
    model = open_model(server.planner("no-usage"), RunConfig())
    ask(model, Plan, QUESTION, on_call=records.append, meter=book)
    [record], [(prompt, _)] = records, book.admitted
    written = count_tokens(json.dumps(DEFAULT_PLAN))
    assert (record.input_tokens, record.output_tokens, record.own_count) == (prompt, written, prompt + written)
