"""Whole runs planned by endpoints that misbehave: they finish, go on with the fallback, or stop and can be resumed."""

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, read_events, read_state, read_summary, read_trials
from tests.openai_server import OpenAIServer

PLANS: list[dict[str, Any]] = [{"sparsity": 0.3, "reason": "a step"}, {"sparsity": 0.45, "reason": "the rest"}]
BAD: list[dict[str, Any]] = [{"sparsity": 45, "reason": "a percentage"}]
IMPOSSIBLE = {"sparsity": 0.45, "adjustments": [{"selector": "*.nothing", "action": "protect"}]}
ABOVE = {"sparsity": 0.9, "reason": "above the target"}


def flags(model: Path, server: OpenAIServer, behaviour: str, *more: str) -> list[str]:
    return [
        *("--name", "run", "--model", str(model), "--planner", server.planner(behaviour), *TINY),
        *("--max-iterations", "2", "--planner-timeout", "5", *more),
    ]


@pytest.mark.parametrize(
    "behaviour",
    [
        *("prose-once", "percent-once", "nan-once", "truncated-once", "rate-twice", "fenced", "think", "no-usage"),
        *("no-response-format-500", "bare-422", "ignores-tools"),
    ],
)
def test_a_clumsy_endpoint_plans_a_run_to_its_end(
    behaviour: str, tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    with OpenAIServer(PLANS) as server:
        done = command(*flags(tiny_llama, server, behaviour))
    assert (done.code, done.err) == (0, "")
    run = tmp_path / "runs" / "run"
    assert [trial.plan for trial in read_state(run).trials] == [
        "30.0% refit:kappa",
        "45.0% refit:kappa",
    ]
    assert read_summary(run)["achieved_sparsity"] == pytest.approx(0.45, abs=5e-4)
    used = [reply for reply in read_events(run, "reply") if not reply["problem"]]
    assert len(used) == 2
    problems = [reply["problem"] for reply in read_events(run, "reply") if reply["problem"]]
    assert bool(problems) == (behaviour in ("prose-once", "percent-once", "nan-once", "truncated-once"))
    assert done.out.count("handed back: ") == len(problems)


def test_plans_that_cannot_be_carried_out_are_handed_back_with_the_reason(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    with OpenAIServer([ABOVE, IMPOSSIBLE, *PLANS]) as server:
        assert command(*flags(tiny_llama, server, "fine")).code == 0
    problems = [reply["problem"] for reply in read_events(tmp_path / "runs" / "run", "reply")]
    assert problems[0] == "sparsity 0.9 is above the target; plan at most 0.45"
    assert problems[1].startswith("selector '*.nothing' means no layer; layers are named like ")
    assert problems[2:] == ["", ""]
    assert problems[0] in server.requests[1].messages[-1]["content"]


def test_an_endpoint_that_never_answers_well_stops_the_run_which_a_better_one_finishes(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "runs" / "run"
    with OpenAIServer(BAD) as server:
        given = flags(tiny_llama, server, "model")
        stopped = command(*given)
        port = int(server.url.split(":")[2].split("/")[0])
    assert (stopped.code, stopped.err) == (1, "")
    assert len(server.requests) == 4, "three answers were handed back"
    assert stopped.out.splitlines()[-2:] == [
        f"stopped: openai:model at {server.url} gave no usable Plan in 4 answers; the last one: sparsity: Input should "
        "be less than 1, not 45; that looks like a percentage: write 0.45",
        "resume with: python -m graph.run --resume run",
    ]
    unreachable = command("--resume", "run")
    assert unreachable.code == 1
    assert f"stopped: openai:model at {server.url} cannot be reached or hung up" in unreachable.out
    with OpenAIServer(PLANS, port=port):
        resumed = command("--resume", "run")
    assert (resumed.code, resumed.err) == (0, "")
    with OpenAIServer(PLANS) as easy:
        assert command("--runs-dir", "easy", *flags(tiny_llama, easy, "model")).code == 0
    assert read_trials(run) == read_trials(tmp_path / "easy" / "run")
    assert read_summary(run)["mask_sha256"] == read_summary(tmp_path / "easy" / "run")["mask_sha256"]


@pytest.mark.parametrize("behaviour", ["prose", "unavailable", "hang-up", "not-found", "refusal"])
def test_the_fallback_goes_on_and_says_so(behaviour: str, tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    with OpenAIServer() as server:
        more = ["--planner-fallback", "heuristic", "--planner-retries", "0"]
        done = command(*flags(tiny_llama, server, behaviour, *more))
    assert (done.code, done.err) == (0, "")
    warnings = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2, "one a round"
    for warning in warnings:
        assert warning.startswith(f"warning: openai:{behaviour} at {server.url} ")
        assert warning.endswith("; the fallback planner (heuristic) plans this round")
    assert [event["text"] for event in read_events(tmp_path / "runs" / "run", "warning")] == [
        warning.removeprefix("warning: ") for warning in warnings
    ]
    assert command("--runs-dir", "rule", "--name", "run", "--model", str(tiny_llama), *TINY, "--max-iterations", "2")
    rule = read_summary(tmp_path / "rule" / "run")
    assert read_summary(tmp_path / "runs" / "run")["mask_sha256"] == rule["mask_sha256"]
