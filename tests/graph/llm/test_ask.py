"""Chat models that behave and misbehave, over real HTTP: what comes back is a valid answer or one clean line."""

import json
import socket
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel

from graph.config import RunConfig
from graph.llm import ladder
from graph.llm.ask import CallRecord, ask
from graph.llm.attempts import count_tokens
from graph.llm.ladder import AgentError
from graph.llm.models import open_model
from graph.planning.plan import Plan
from tests.graph.llm.asking import KEY, PLAN, QUESTION
from tests.openai_server import BEHAVIOURS, DEFAULT_PLAN, OpenAIServer


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, unknown_endpoints: None) -> None:
    monkeypatch.setenv("BILLHOOK_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


def ask_server(server: OpenAIServer, name: str, *, retries: int = 2, timeout: float = 20, **options: Any) -> Plan:
    config = RunConfig(agent_timeout=timeout, agent_retries=retries)
    return ask(open_model(server.planner(name), config), Plan, QUESTION, **options)


def traffic(server: OpenAIServer) -> list[tuple[str, int]]:
    return [(request.method, request.status) for request in server.requests]


LADDER = ("json_schema", "function_calling", "json_mode", "text")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("any-other-name", [("json_schema", 200)]),
        ("fenced", [("json_schema", 200)]),
        ("think", [("json_schema", 200)]),
        ("think-unopened", [("json_schema", 200)]),
        ("braces", [("json_schema", 200)]),
        ("no-usage", [("json_schema", 200)]),
        ("no-tools", [("json_schema", 200)]),
        ("no-response-format", [("json_schema", 400), ("function_calling", 200)]),
        ("no-response-format-500", [("json_schema", 500), ("function_calling", 200)]),
        ("ignores-tools", [("json_schema", 400), ("function_calling", 200)]),
        ("json-mode-only", [("json_schema", 400), ("function_calling", 400), ("json_mode", 200)]),
        ("bare", list(zip(LADDER, (400, 400, 400, 200), strict=True))),
        ("bare-422", list(zip(LADDER, (422, 422, 422, 200), strict=True))),
        ("bare-500", list(zip(LADDER, (500, 500, 500, 200), strict=True))),
        ("rate-twice", [("json_schema", 429), ("json_schema", 429), ("json_schema", 200)]),
        ("prose-once", [("json_schema", 200)] * 2),
        ("percent-once", [("json_schema", 200)] * 2),
        ("nan-once", [("json_schema", 200)] * 2),
        ("truncated-once", [("json_schema", 200)] * 2),
    ],
)
def test_plan_arrives(server: OpenAIServer, name: str, expected: list[tuple[str, int]]) -> None:
    records: list[CallRecord] = []
    assert ask_server(server, name, on_call=records.append) == PLAN
    assert traffic(server) == expected
    replies = [request for request in server.requests if request.status == 200]
    if name == "no-usage":
        [record] = records
        assert (record.own_count, record.output_tokens) == (
            record.input_tokens + record.output_tokens,
            count_tokens(json.dumps(DEFAULT_PLAN)),
        )
        assert record.input_tokens > count_tokens(json.dumps(server.requests[0].messages))
        return
    assert [(r.input_tokens, r.output_tokens, r.own_count) for r in records] == [
        (request.prompt_tokens, request.completion_tokens, 0) for request in replies
    ]
    assert [record.method for record in records] == [request.method for request in replies]
    assert [bool(record.problem) for record in records] == [True] * (len(records) - 1) + [False]
    assert all(record.input_tokens > 0 and record.output_tokens > 0 for record in records)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("prose", "There is no JSON object in the answer."),
        ("empty", "The answer is empty."),
        ("percent", "sparsity: Input should be less than 1, not 45; that looks like a percentage: write 0.45"),
        ("percent-sign", 'not "45%"; that looks like a percentage: write 0.45'),
        ("nan", "sparsity: NaN is no number; write a finite one"),
        ("infinity", "recipe.strength: Infinity is no number; write a finite one"),
        ("flood", "adjustments: List should have at most 64 items after validation, not 10000"),
        (
            "wrong-schema",
            "'sparsegpt', 'two-sided-obs' or 'refit', not \"magic\"",
        ),
        ("wrong-schema", "adjustments.0.selector: is missing"),
        ("wrong-schema", "target: there is no such field; leave it out"),
        ("surrogates", "?: there is no such field; leave it out"),
        ("truncated", "The answer was cut off at the length limit."),
        ("long-prose", "There is no JSON object in the answer."),
    ],
)
def test_answer_that_never_fits(server: OpenAIServer, name: str, problem: str) -> None:
    records: list[CallRecord] = []
    with pytest.raises(AgentError) as caught:
        ask_server(server, name, on_call=records.append)
    where = f"openai:{name} at {server.url}"
    assert str(caught.value).startswith(f"{where} gave no usable Plan in 4 answers; the last one: ")
    assert "\n" not in str(caught.value)
    assert traffic(server) == [("json_schema", 200)] * 4
    assert [problem in record.problem for record in records] == [True] * 4
    assert sum(record.input_tokens for record in records) == sum(request.prompt_tokens for request in server.requests)
    assert all(len(record.reply) <= 4_000 and len(record.problem) <= 1_000 for record in records)
    for request in server.requests[1:]:
        answer, reason = request.messages[-2:]
        assert (answer["role"], reason["role"]) == ("assistant", "user")
        assert 0 < len(answer["content"]) <= 4_000
        assert problem in reason["content"]
        assert len(reason["content"]) <= 1_200


@pytest.mark.parametrize(
    ("name", "methods", "problem"),
    [
        ("broken-arguments", ["function_calling"] * 4, "The JSON is broken: Expecting ',' delimiter"),
        ("nan-arguments", ["function_calling"] * 4, "sparsity: NaN is no number"),
        # langchain cannot represent these arguments, so tool calls are given up.
        ("list-arguments", ["function_calling"] + ["json_mode"] * 4, "There is no JSON object"),
    ],
)
def test_bad_tool_call(server: OpenAIServer, name: str, methods: list[str], problem: str) -> None:
    with pytest.raises(AgentError, match=problem):
        ask_server(server, name)
    assert [request.method for request in server.requests] == ["json_schema", *methods]


def test_hand_back_reads_well(server: OpenAIServer) -> None:
    ask_server(server, "percent-once")
    assert server.requests[1].messages == [
        {"content": "Plan, as JSON.", "role": "user"},
        {"content": '{"sparsity": 45}', "role": "assistant"},
        {
            "content": "That answer cannot be used:\n"
            "sparsity: Input should be less than 1, not 45; that looks like a percentage: write 0.45\n"
            "Answer again with one JSON object that fits the schema, and nothing else.",
            "role": "user",
        },
    ]


@pytest.mark.parametrize("hand_backs", [0, 1, 5])
def test_hand_backs_are_bounded(server: OpenAIServer, hand_backs: int) -> None:
    with pytest.raises(AgentError, match=f"in {hand_backs + 1} answers?;"):
        ask_server(server, "prose", hand_backs=hand_backs)
    assert len(server.requests) == hand_backs + 1


def test_check_hands_back(server: OpenAIServer) -> None:
    seen: list[Plan] = []
    records: list[CallRecord] = []

    def check(plan: Plan) -> None:
        seen.append(plan)
        if len(seen) < 3:
            raise ValueError("sparsity 0.3 is above the target 0.2")

    assert ask_server(server, "good", check=check, on_call=records.append) == PLAN
    assert [record.problem for record in records] == ["sparsity 0.3 is above the target 0.2"] * 2 + [""]
    assert "sparsity 0.3 is above the target 0.2" in server.requests[2].messages[-1]["content"]
    assert len(server.requests[2].messages) == 5


@pytest.mark.parametrize(("hand_backs", "problems"), [(3, ["a waste", ""]), (0, [""])])
def test_advice_is_given_once_and_never_for_the_last_answer(
    server: OpenAIServer, hand_backs: int, problems: list[str]
) -> None:
    records: list[CallRecord] = []
    answer = ask_server(server, "good", advise=lambda plan: "a waste", hand_backs=hand_backs, on_call=records.append)
    assert answer == PLAN
    assert [record.problem for record in records] == problems
    assert len(server.requests) == len(problems)


@pytest.mark.parametrize(
    ("name", "requests", "said"),
    [
        ("rate-forever", 3, "limits the rate or the quota (HTTP 429: slow down), after 3 requests"),
        ("unavailable", 3, "failed (HTTP 503: overloaded), after 3 requests"),
        ("broken", 6, "failed (HTTP 500: boom), after 6 requests"),
        ("bad-request", 4, "rejected the request (HTTP 400: no), after 4 requests"),
        ("unauthorized", 1, "wants another API key than BILLHOOK_API_KEY holds (HTTP 401), after 1 request"),
        ("forbidden", 1, "denies access (HTTP 403: key [key] may not), after 1 request"),
        ("not-found", 1, "knows no such model or address (HTTP 404: no such model), after 1 request"),
        ("too-long", 1, "cannot take so long a prompt (context_length_exceeded: prompt is too long), after 1 request"),
        ("html", 1, "sent no chat completion (ValueError: "),
        ("error-body", 1, "sent no chat completion (ValueError: {'message': 'out of memory'}), after 1 request"),
        ("null-choices", 1, "sent no chat completion (TypeError: "),
        ("no-choices", 1, "sent no chat completion (IndexError: "),
        ("refusal", 1, "refused to answer: I cannot help with weapons."),
        ("filtered", 1, "refused to answer: stopped by a content filter"),
    ],
)
def test_endpoint_in_trouble(server: OpenAIServer, name: str, requests: int, said: str) -> None:
    records: list[CallRecord] = []
    with pytest.raises(AgentError) as caught:
        ask_server(server, name, on_call=records.append)
    assert str(caught.value).startswith(f"openai:{name} at {server.url} {said}")
    assert "\n" not in str(caught.value)
    assert len(server.requests) == requests
    assert len(records) == (name in ("refusal", "filtered"))  # tokens of a refusal are paid for


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("slow", "gave no answer within 0.2 s, after 2 requests"),
        ("hang-up", "cannot be reached or hung up (Server disconnected without sending a response.), after 2 requests"),
    ],
)
def test_endpoint_that_does_not_answer(server: OpenAIServer, name: str, said: str) -> None:
    start = time.perf_counter()
    with pytest.raises(AgentError) as caught:
        ask_server(server, name, timeout=0.2 if name == "slow" else 20, retries=1)
    assert str(caught.value) == f"openai:{name} at {server.url} {said}"
    assert len(server.requests) == 2
    assert time.perf_counter() - start < 5


def test_unreachable_endpoint() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        planner = f"openai:m@http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(AgentError, match=r"cannot be reached or hung up \(.*refused\), after 1 request"):
            ask(open_model(planner, RunConfig(agent_timeout=5, agent_retries=0)), Plan, QUESTION)


def test_unknown_500_is_not_repeated(server: OpenAIServer) -> None:
    start = time.perf_counter()
    assert ask_server(server, "bare-500", retries=10) == PLAN
    assert len(server.requests) == 4
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(("name", "steps"), [("no-response-format", 2), ("json-mode-only", 3), ("bare-500", 4)])
def test_rung_is_remembered(server: OpenAIServer, name: str, steps: int) -> None:
    ask_server(server, name)
    assert len(server.requests) == steps
    ask_server(server, name)
    assert [request.method for request in server.requests[steps:]] == [LADDER[steps - 1]]
    with OpenAIServer() as other:
        ask_server(other, name)
        assert len(other.requests) == steps


def test_500_of_a_known_rung_is_repeated_and_the_rung_forgotten(server: OpenAIServer) -> None:
    ask_server(server, "broken-later")
    for _ in range(2):
        with pytest.raises(AgentError, match="HTTP 500: boom"):
            ask_server(server, "broken-later")
    # Known: repeated on its rung. Then forgotten: down the whole ladder, as for an unknown endpoint.
    assert [request.method for request in server.requests] == ["json_schema"] * 4 + [
        *LADDER[:3],
        *["text"] * 3,
    ]


def test_functions_are_sent_without_length_bounds(server: OpenAIServer) -> None:
    ask_server(server, "no-response-format")
    sent = json.dumps(server.requests[-1].body)
    assert '"exclusiveMaximum": 1' in sent
    assert "Length" not in sent
    assert "Items" not in sent


def test_no_list_or_string_of_an_answer_is_endless(server: OpenAIServer) -> None:
    ask_server(server, "good")
    schema = server.requests[-1].body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["sparsity"]["exclusiveMaximum"] == 1
    assert schema["properties"]["adjustments"]["maxItems"] == 16
    assert schema["properties"]["reason"]["maxLength"] == 400
    assert schema["$defs"]["Adjustment"]["properties"]["selector"]["maxLength"] == 200
    assert "minLength" not in json.dumps(schema)
    assert "maxLength" not in schema["$defs"]["Recipe"]["properties"]["method"]


def test_a_field_called_like_a_bound_is_kept() -> None:
    class Odd(BaseModel):
        maxLength: int
        type: str

    schema = ladder.bound_lengths(Odd.model_json_schema(), ladder.MAX_WRITTEN)
    assert list(schema["properties"]) == ["maxLength", "type"]
    assert schema["properties"]["type"]["maxLength"] == 400


def test_streamed_graph_keeps_token_counts(server: OpenAIServer) -> None:
    class State(BaseModel):
        tokens: int = 0

    def plan(state: State) -> dict[str, int]:
        records: list[CallRecord] = []
        ask_server(server, "good", on_call=records.append)
        return {"tokens": records[0].input_tokens}

    graph = StateGraph(State).add_node(plan).add_edge(START, "plan").add_edge("plan", END).compile()
    parts = list(graph.stream(State(), stream_mode=["messages", "updates"]))
    [request] = server.requests
    assert not request.body.get("stream")
    assert parts[-1] == ("updates", {"plan": {"tokens": request.prompt_tokens}})
    assert request.prompt_tokens > 0


@pytest.mark.parametrize("name", sorted(set(BEHAVIOURS) - {"slow", "slow-once", "hang-up"}))
def test_key_never_shows(server: OpenAIServer, name: str) -> None:
    shown: list[str] = []
    errors: list[AgentError] = []
    try:
        answer = ask_server(server, name, on_call=lambda record: shown.append(record.model_dump_json()))
        shown.append(answer.model_dump_json())
    except AgentError as error:
        errors.append(error)
        shown += traceback.format_exception(error)
    assert [(error.__cause__, error.__context__) for error in errors] == [(None, None)] * len(errors)
    text = "".join(shown)
    assert shown
    assert KEY not in text
    assert "sk-pr" not in text
    assert all(request.key == KEY for request in server.requests)


def test_agent_error_is_one_redacted_line() -> None:
    assert str(AgentError(f"no\n use of\t{KEY}")) == "no use of [key]"
