"""What agents spend is counted, whatever comes of it, and ends where the caps say."""

import json
from pathlib import Path
from typing import Any

import pytest

from graph.checks import check_prices
from graph.config import RunConfig
from graph.llm.ask import CallRecord, Reply
from graph.llm.ladder import AgentError
from graph.llm.spending import Account, Agent, CapReached, add_calls, check_cap, read_spent
from graph.planning.choose import choose_plan
from graph.planning.plan import Plan
from graph.runs.session import Session
from tests.openai_server import OpenAIServer
from tests.situations import make_first_situation
from tools.base.errors import UserError
from tools.results.schema import Usage

pytestmark = pytest.mark.usefixtures("unknown_endpoints")

PRICES = RunConfig(planner_price_input=2, planner_price_output=8, reflector_price_input=1, reflector_price_output=4)
TOO_FAR = {"sparsity": 0.9}


@pytest.fixture(autouse=True)
def _one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts say what is left of a cap, and are of one length here whatever it is."""
    monkeypatch.setattr("graph.planning.brief.describe_spending", lambda *_: "")


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


def test_what_no_endpoint_tells_is_our_count_in_the_log_and_the_state(tmp_path: Path) -> None:
    with OpenAIServer() as server:
        _, usage = choose(server, tmp_path, Usage(calls=1, input_tokens=10), planner=server.planner("no-usage"))
    assert usage.own_count == usage.input_tokens - 10 + usage.output_tokens > 5_000
    assert usage.cost == pytest.approx((2 * (usage.input_tokens - 10) + 8 * usage.output_tokens) / 1e6)
    assert read_usage(tmp_path) == [usage]


def test_requests_that_were_tried_again_are_counted(tmp_path: Path) -> None:
    prompt = measure_prompt(tmp_path / "measured")
    with OpenAIServer() as server:
        _, usage = choose(server, tmp_path, Usage(), planner=server.planner("rate-twice"))
        told = server.requests[-1]
    assert usage.model_dump() == pytest.approx(
        {
            "calls": 1,
            "input_tokens": 2 * prompt + told.prompt_tokens,
            "output_tokens": told.completion_tokens,
            "cost": (2 * (2 * prompt + told.prompt_tokens) + 8 * told.completion_tokens) / 1e6,
            "own_count": 2 * prompt,
            "failed_requests": 2,
        }
    )
    assert [(kept.calls, kept.failed_requests) for kept in read_usage(tmp_path)] == [(0, 1), (0, 2), (1, 2)]
    assert [(event["again"], event["input_tokens"], event["output_tokens"]) for event in read_requests(tmp_path)] == [
        (True, prompt, 0),
        (True, prompt, 0),
    ]


def test_a_request_that_timed_out_counts_with_the_longest_answer(tmp_path: Path) -> None:
    prompt = measure_prompt(tmp_path / "measured")
    options = {"agent_timeout": 0.3, "agent_retries": 0, "agent_answer_tokens": 300}
    with OpenAIServer() as server, pytest.raises(AgentError, match="gave no answer within"):
        choose(server, tmp_path, Usage(), planner=server.planner("slow"), **options)
    [usage] = read_usage(tmp_path)
    assert (usage.calls, usage.failed_requests) == (0, 1)
    assert (usage.input_tokens, usage.output_tokens, usage.own_count) == (prompt, 300, prompt + 300)
    assert read_spent(tmp_path, Usage()) == usage, "the state knows nothing of it"


# Caps


def measure_prompt(directory: Path) -> int:
    """Our count of the first request of `choose`."""
    directory.mkdir()
    with OpenAIServer() as server, pytest.raises(CapReached) as caught:
        choose(server, directory, Usage(), max_agent_tokens=1)
    assert not server.requests
    return int(str(caught.value).split("may take ")[1].split(" more")[0].replace(",", ""))


def read_requests(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"type": "request"' in line]


def check(config: RunConfig, sent: int, written: int, cost: float) -> None:
    """As before a request that may take so much, when 1,500 tokens and $0.3 have been spent."""
    spent = Usage(calls=2, input_tokens=1000, output_tokens=500, cost=0.3)
    check_cap(spent, Usage(input_tokens=1000 + sent, output_tokens=500 + written, cost=0.3 + cost), config)


def test_no_cap_is_no_cap() -> None:
    check(RunConfig(), 10**12, 10**12, 1e9)


@pytest.mark.parametrize(
    ("caps", "said"),
    [
        ({"max_agent_tokens": 1500}, "the agents have spent 1,500 tokens, and max_agent_tokens is 1,500"),
        (
            {"max_agent_tokens": 1649},
            "the agents have spent 1,500 tokens, and max_agent_tokens is 1,649; a request may take 100 more "
            "(our count) and its answer 50",
        ),
        ({"max_agent_cost": 0.25}, "the agents have spent $0.3, and max_agent_cost is $0.25"),
        (
            {"max_agent_cost": 0.34},
            "the agents have spent $0.3, and max_agent_cost is $0.34; a request and its answer may take $0.05 more",
        ),
    ],
)
def test_a_cap_that_is_reached_or_could_be_passed_is_one_line(caps: dict[str, Any], said: str) -> None:
    with pytest.raises(CapReached) as caught:
        check(RunConfig.model_validate(caps), 100, 50, 0.05)
    [field] = caps
    assert str(caught.value) == (f"{said}; go on with --resume NAME --{field.replace('_', '-')} N, where 0 is no cap")


def test_below_the_caps_a_call_may_start() -> None:
    check(RunConfig(max_agent_tokens=1650, max_agent_cost=0.36), 100, 50, 0.05)


@pytest.mark.parametrize("fallback", ["none", "heuristic"])
def test_nothing_is_asked_at_the_cap_and_no_fallback_helps(fallback: str, tmp_path: Path) -> None:
    with OpenAIServer() as server, pytest.raises(CapReached):
        choose(server, tmp_path, Usage(calls=1, input_tokens=10), max_agent_tokens=10, planner_fallback=fallback)
    assert not server.requests


@pytest.mark.parametrize("name", ["m", "no-usage"])
def test_the_cap_ends_a_round_between_two_answers(name: str, tmp_path: Path) -> None:
    caps = {"max_agent_tokens": measure_prompt(tmp_path / "measured") + 300, "agent_answer_tokens": 300}
    with OpenAIServer([TOO_FAR]) as server, pytest.raises(CapReached):
        choose(server, tmp_path, Usage(), planner=server.planner(name), **caps)
    assert len(server.requests) == 1
    with OpenAIServer() as server, pytest.raises(CapReached):
        choose(server, tmp_path, Usage(), planner=server.planner(name), **caps)
    assert not server.requests, "the log knows what was spent"


def test_the_cap_ends_a_round_between_two_tries(tmp_path: Path) -> None:
    caps = {"max_agent_tokens": measure_prompt(tmp_path / "measured") + 300, "agent_answer_tokens": 300}
    with OpenAIServer() as server, pytest.raises(CapReached):
        choose(server, tmp_path, Usage(), planner=server.planner("unavailable"), **caps)
    assert len(server.requests) == 1


def test_a_cost_that_the_next_answer_could_pass_ends_a_round_before_it(tmp_path: Path) -> None:
    most = (2 * measure_prompt(tmp_path / "measured") + 8 * 300) / 1e6
    with OpenAIServer() as server, pytest.raises(CapReached, match=r"a request and its answer may take \$"):
        choose(server, tmp_path, Usage(), max_agent_cost=0.999 * most, agent_answer_tokens=300)
    assert not server.requests
    with OpenAIServer() as server:
        plan, usage = choose(server, tmp_path, Usage(), max_agent_cost=1.001 * most, agent_answer_tokens=300)
    assert plan is not None and 0 < usage.cost < most


def test_an_answer_that_was_paid_for_is_used(tmp_path: Path) -> None:
    prompt = measure_prompt(tmp_path / "measured")
    with OpenAIServer() as server:
        plan, usage = choose(server, tmp_path, Usage(), max_agent_tokens=prompt + 300, agent_answer_tokens=300)
    assert plan is not None and usage.calls == 1


# Prices


@pytest.mark.parametrize(
    ("changes", "agent"),
    [
        ({"planner": "openai:m"}, "planner"),
        ({"planner": "openai:m", "planner_price_input": 2}, "planner"),
        ({"planner": "openai:m@http://h/v1", "planner_price_output": 8}, "planner"),
        ({"reflector": "anthropic:m", "planner_price_input": 2, "planner_price_output": 8}, "reflector"),
        ({"planner": "local:x", "reflector": "openai:m"}, "reflector"),
    ],
)
def test_a_cap_on_the_cost_wants_both_prices(changes: dict[str, Any], agent: str) -> None:
    config = RunConfig.model_validate({"max_agent_cost": 1, **changes})
    with pytest.raises(UserError) as caught:
        check_prices(config)
    assert str(caught.value) == (
        f"max_agent_cost caps nothing without prices: give --{agent}-price-input and --{agent}-price-output, in "
        f"dollars per million tokens of {changes[agent]}, or --max-agent-cost 0"
    )
    check_prices(config.model_copy(update={"max_agent_cost": 0.0}))
    check_prices(config.model_copy(update={f"{agent}_price_input": 1.0, f"{agent}_price_output": 1.0}))


@pytest.mark.parametrize("changes", [{}, {"planner": "local:x", "reflector": "local:x"}])
def test_what_costs_nothing_needs_no_price(changes: dict[str, Any]) -> None:
    check_prices(RunConfig.model_validate({"max_agent_cost": 1, **changes}))


def test_a_cap_raised_while_the_run_goes_on_wants_prices_too(tmp_path: Path) -> None:
    prices = {"planner_price_input": 0, "planner_price_output": 0}
    with OpenAIServer() as server, pytest.raises(UserError, match="caps nothing without prices"):
        choose(server, tmp_path, Usage(), max_agent_cost=1, **prices)
    assert not server.requests
