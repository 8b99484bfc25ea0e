"""A cap on what the agents spend ends a run, which a higher cap finishes as if there had been none."""

import re
from pathlib import Path
from typing import Any

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, read_events, read_state, read_summary, read_trials
from tests.openai_server import OpenAIServer

PLANS: list[dict[str, Any]] = [{"sparsity": 0.3, "reason": "a step"}, {"sparsity": 0.45, "reason": "the rest"}]
PRICES = ["--planner-price-input", "2", "--planner-price-output", "8"]


def flags(model: Path, server: OpenAIServer, name: str = "m") -> list[str]:
    planner = ["--planner", server.planner(name), "--planner-calls", "0", "--agent-answer-tokens", "300", *PRICES]
    return ["--name", "run", "--model", str(model), *TINY, "--max-iterations", "2", *planner]


def test_a_run_stops_at_its_cap_and_goes_on_with_another(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "runs" / "run"
    with OpenAIServer(PLANS) as server:
        stopped = command(*flags(tiny_llama, server), "--max-agent-tokens", "1")
        assert (stopped.code, stopped.err, len(server.requests)) == (1, "", 0)
        said = re.fullmatch(
            r"stopped: the agents have spent 0 tokens, and max_agent_tokens is 1; a request may take ([\d,]+) more "
            r"\(our count\) and its answer 300; go on with --resume NAME --max-agent-tokens N, where 0 is no cap",
            stopped.out.splitlines()[-2],
        )
        assert said and stopped.out.splitlines()[-1] == "resume with: python -m graph.run --resume run"
        most = int(said[1].replace(",", "")) + 300
        once = command("--resume", "run", "--max-agent-tokens", str(most))
        assert (once.code, len(server.requests)) == (1, 1), "the next round could pass the cap"
        spent = server.requests[0].prompt_tokens + server.requests[0].completion_tokens
        assert (
            f"stopped: the agents have spent {spent:,} tokens, and max_agent_tokens is {most:,}; a request " in once.out
        )
        still = command("--resume", "run")
        assert (still.code, len(server.requests)) == (1, 1), "the cap is still there"
        costly = command("--resume", "run", "--max-agent-tokens", "0", "--max-agent-cost", "0.000001")
        assert (costly.code, len(server.requests)) == (1, 1)
        assert "and max_agent_cost is $1e-06; go on with --resume NAME --max-agent-cost N" in costly.out
        done = command("--resume", "run", "--max-agent-cost", "0")
        assert (done.code, done.err) == (0, "")
        assert len(server.requests) == 2
        sent = sum(request.prompt_tokens for request in server.requests)
    usage = read_state(run).usage
    assert (usage.calls, usage.input_tokens) == (2, sent)
    assert read_events(run, "usage")[-1]["cost"] == usage.cost > 0
    with OpenAIServer(PLANS) as free:
        assert command("--runs-dir", "free", *flags(tiny_llama, free)).code == 0
    assert read_trials(run) == read_trials(tmp_path / "free" / "run")
    assert read_summary(run)["mask_sha256"] == read_summary(tmp_path / "free" / "run")["mask_sha256"]


def test_a_cap_on_the_cost_without_prices_is_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    with OpenAIServer(PLANS) as server:
        planner = server.planner("m")
        refused = command("--model", str(tiny_llama), *TINY, "--planner", planner, "--max-agent-cost", "1")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        "error: max_agent_cost caps nothing without prices: give --planner-price-input and --planner-price-output, in "
        f"dollars per million tokens of {planner}, or --max-agent-cost 0\n"
    )
    assert not server.requests and not (tmp_path / "runs").exists()


def test_tokens_that_an_endpoint_does_not_tell_are_counted_said_and_capped(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "runs" / "run"
    with OpenAIServer(PLANS) as server:
        stopped = command(*flags(tiny_llama, server, "no-usage"), "--max-agent-cost", "0.03")
        assert (stopped.code, len(server.requests)) == (1, 1)
        spent = read_events(run, "usage")[-1]
        assert spent["own_count"] == spent["input_tokens"] + spent["output_tokens"] > 5_000
        assert f"the agents have spent ${spent['cost']:.4g}, and max_agent_cost is $0.03; a request" in stopped.out
        done = command("--resume", "run", "--max-agent-cost", "1", "--planner-price-output", "9")
    assert (done.code, done.err, len(server.requests)) == (0, "", 2)
    agents = read_summary(run)["agents"]
    assert agents["own_count"] == agents["input_tokens"] + agents["output_tokens"] > spent["own_count"]
    own = f"{agents['own_count']:,} of the tokens by our own count"
    assert own in done.out
    assert own in (run / "report.md").read_text(encoding="utf-8")
    assert own in (run / "report.html").read_text(encoding="utf-8")


def test_requests_that_were_tried_again_are_told(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    with OpenAIServer(PLANS) as server:
        done = command(*flags(tiny_llama, server, "rate-twice"))
    assert (done.code, done.err) == (0, "")
    usage = read_state(tmp_path / "runs" / "run").usage
    assert (usage.calls, usage.failed_requests) == (2, 2)
    requests = read_events(tmp_path / "runs" / "run", "request")
    assert usage.own_count == sum(request["input_tokens"] for request in requests)
    told = f"request: {server.planner('rate-twice')} limits the rate or the quota (HTTP 429: slow down); counted"
    assert done.out.count(told) == 2 and "; 2 requests failed" in done.out


def test_what_a_planner_spends_that_brings_no_plan_is_counted(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "runs" / "run"
    with OpenAIServer([PLANS[0], *["no plan at all"] * 20]) as server:
        done = command(*flags(tiny_llama, server), "--planner-unaided")
        assert (done.code, done.err) == (0, "")
        assert "the planner gave no usable plan" in done.out
        sent = sum(request.prompt_tokens for request in server.requests)
        answered = sum(request.completion_tokens for request in server.requests)
    assert len(server.requests) > 2
    agents = read_summary(run)["agents"]
    assert (agents["calls"], agents["input_tokens"], agents["output_tokens"]) == (len(server.requests), sent, answered)


def test_no_round_begins_once_the_seconds_are_gone_and_a_replay_has_no_clock(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    given = ["--model", str(tiny_llama), *TINY]
    late = command("--name", "late", *given, "--max-seconds", "0.001")
    assert (late.code, late.err) == (0, "") and "of at most 0.001 seconds were spent" in late.out
    assert read_summary(tmp_path / "runs" / "late")["iterations"] == 0
    assert command("--name", "run", *given, "--max-iterations", "2").code == 0
    assert command("--replay", "run", "--name", "again", "--max-seconds", "0.001").code == 0
    assert read_trials(tmp_path / "runs" / "again") == read_trials(tmp_path / "runs" / "run")
