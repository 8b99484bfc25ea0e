"""What agents spend is counted, whatever comes of it, and ends where the caps say."""

import json
from pathlib import Path
from typing import Any

import pytest

from graph.config import RunConfig
from graph.llm.ask import CallRecord, Reply
from graph.llm.ladder import AgentError
from graph.llm.spending import Account, Agent, CapReached, add_calls, check_cap, read_spent
from graph.planning.choose import choose_plan
from graph.planning.plan import Plan
from graph.runs.session import Session
from tests.openai_server import OpenAIServer
from tests.situations import make_first_situation
from tools.results.schema import Usage

pytestmark = pytest.mark.usefixtures("unknown_endpoints")

PRICES = RunConfig(planner_price_input=2, planner_price_output=8, reflector_price_input=1, reflector_price_output=4)
TOO_FAR = {"sparsity": 0.9}


def call(sent: int, written: int) -> CallRecord:
    return CallRecord(method="text", reply="", input_tokens=sent, output_tokens=written, seconds=0)


def log(directory: Path, *lines: str) -> None:
    (directory / "events.jsonl").write_text("\n".join(lines) + "\n")


def usage_line(**usage: Any) -> str:
    return json.dumps({"time": 1785000000.123, "type": "usage", **Usage(**usage).model_dump()})


def read_usage(directory: Path) -> list[Usage]:
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [Usage.model_validate_json(line) for line in lines if '"usage"' in line]


def choose(server: OpenAIServer, directory: Path, usage: Usage, **changes: Any) -> tuple[Plan | None, Usage]:
    values = PRICES.model_dump() | {"planner": server.planner("m")} | changes
    situation = make_first_situation(config=RunConfig.model_validate(values))
    return choose_plan(situation, usage, Session(directory, lambda _event: None, 0.0), situation.config)[:2]


# Counting


def test_every_agent_has_its_prices() -> None:
    usage = add_calls(Usage(), [call(1_000_000, 500_000), call(0, 0)], PRICES, "planner")
    assert usage == Usage(calls=2, input_tokens=1_000_000, output_tokens=500_000, cost=6.0)
    usage = add_calls(usage, [call(1_000_000, 500_000)], PRICES, "reflector")
    assert usage == Usage(calls=3, input_tokens=2_000_000, output_tokens=1_000_000, cost=9.0)


def test_what_a_stopped_node_spent_is_read_from_the_log(tmp_path: Path) -> None:
    known = Usage(calls=1, input_tokens=10, output_tokens=1)
    more = {"calls": 3, "input_tokens": 30, "output_tokens": 3, "cost": 0.5}
    assert read_spent(tmp_path, known) == known
    log(tmp_path, '{"time": 1, "type": "node"}')
    assert read_spent(tmp_path, known) == known
    log(tmp_path, usage_line(calls=2), usage_line(**more), '{"time": 1, "type": "node"}')
    assert read_spent(tmp_path, known) == Usage(**more)
    assert read_spent(tmp_path, Usage(calls=4)) == Usage(calls=4)
    log(tmp_path, usage_line(**more), '{"time": 1, "type": "reply", "reply": "\\"type\\": \\"usage\\""}')
    assert read_spent(tmp_path, known) == Usage(**more)
    log(tmp_path, usage_line(**more), usage_line(calls=9)[:60])  # a kill cut it short
    assert read_spent(tmp_path, known) == Usage(**more)


def test_calls_of_a_round_that_failed_are_paid_for(tmp_path: Path) -> None:
    with OpenAIServer([TOO_FAR]) as server, pytest.raises(AgentError, match="is above the target"):
        choose(server, tmp_path, Usage())
    sent = sum(request.prompt_tokens for request in server.requests)
    written = sum(request.completion_tokens for request in server.requests)
    spent = Usage(calls=4, input_tokens=sent, output_tokens=written, cost=(2 * sent + 8 * written) / 1e6)
    assert read_usage(tmp_path)[-1].model_dump() == pytest.approx(spent.model_dump())
    with OpenAIServer() as server:
        _, usage = choose(server, tmp_path, Usage())
    assert (usage.calls, usage.input_tokens) == (5, sent + server.requests[0].prompt_tokens)


def test_replies_and_what_they_cost_name_agent_and_round(tmp_path: Path) -> None:
    session = Session(tmp_path, lambda _event: None, 0.0)
    agents: tuple[Agent, ...] = ("planner", "reflector")
    usage = Usage()
    for agent in agents:
        account = Account(agent, session, usage, PRICES, PRICES, iteration=3)
        reply = Reply(text="", **call(1_000_000, 0).model_dump())
        account.keep_call(account.carry_out(lambda reply=reply: reply))  # type: ignore[misc]
        usage = account.usage
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["type"], event["agent"], event["iteration"]) for event in events] == [
        ("reply", "planner", 3),
        ("usage", "planner", 3),
        ("reply", "reflector", 3),
        ("usage", "reflector", 3),
    ]
    assert [event["cost"] for event in events[1::2]] == [2.0, 3.0], "of all agents so far"
    assert read_spent(tmp_path, Usage()) == usage


# Caps


def test_no_cap_is_no_cap() -> None:
    check_cap(Usage(input_tokens=10**12, cost=1e9), RunConfig())


@pytest.mark.parametrize(
    ("caps", "said"),
    [
        (
            {"max_agent_tokens": 1500},
            "the agents have spent 1,500 tokens, and max_agent_tokens is 1,500; go on with --resume NAME "
            "--max-agent-tokens N, where 0 is no cap",
        ),
        (
            {"max_agent_cost": 0.25},
            "the agents have spent $0.3, and max_agent_cost is $0.25; go on with --resume NAME --max-agent-cost N, "
            "where 0 is no cap",
        ),
    ],
)
def test_a_cap_that_is_reached_is_one_line(caps: dict[str, Any], said: str) -> None:
    with pytest.raises(CapReached) as caught:
        check_cap(Usage(calls=2, input_tokens=1000, output_tokens=500, cost=0.3), RunConfig.model_validate(caps))
    assert str(caught.value) == said


def test_below_the_caps_a_call_may_start() -> None:
    config = RunConfig(max_agent_tokens=1501, max_agent_cost=0.31)
    check_cap(Usage(calls=2, input_tokens=1000, output_tokens=500, cost=0.3), config)


@pytest.mark.parametrize("fallback", ["none", "heuristic"])
def test_nothing_is_asked_at_the_cap_and_no_fallback_helps(fallback: str, tmp_path: Path) -> None:
    with OpenAIServer() as server, pytest.raises(CapReached):
        choose(server, tmp_path, Usage(calls=1, input_tokens=10), max_agent_tokens=10, planner_fallback=fallback)
    assert not server.requests


def test_the_cap_ends_a_round_between_two_answers(tmp_path: Path) -> None:
    with OpenAIServer([TOO_FAR]) as server, pytest.raises(CapReached):
        choose(server, tmp_path, Usage(), max_agent_tokens=1)
    assert len(server.requests) == 1
    with OpenAIServer() as server, pytest.raises(CapReached):
        choose(server, tmp_path, Usage(), max_agent_tokens=1)
    assert not server.requests, "the log knows what was spent"


def test_an_answer_that_was_paid_for_is_used(tmp_path: Path) -> None:
    with OpenAIServer() as server:
        plan, usage = choose(server, tmp_path, Usage(), max_agent_tokens=1)
    assert plan is not None and usage.calls == 1
