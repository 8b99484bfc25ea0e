"""A cap on what the agents spend ends a run, which a higher cap finishes as if there had been none."""

from pathlib import Path
from typing import Any

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, read_events, read_state, read_summary, read_trials
from tests.openai_server import OpenAIServer

PLANS: list[dict[str, Any]] = [{"sparsity": 0.3, "reason": "a step"}, {"sparsity": 0.45, "reason": "the rest"}]
PRICES = ["--planner-price-input", "2", "--planner-price-output", "8"]


def flags(model: Path, server: OpenAIServer) -> list[str]:
    planner = ["--planner", server.planner("m"), "--planner-calls", "0", *PRICES]
    return ["--name", "run", "--model", str(model), *TINY, "--max-iterations", "2", *planner]


def test_a_run_stops_at_its_cap_and_goes_on_with_another(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "runs" / "run"
    with OpenAIServer(PLANS) as server:
        stopped = command(*flags(tiny_llama, server), "--max-agent-tokens", "1")
        assert (stopped.code, stopped.err) == (1, "")
        assert len(server.requests) == 1
        spent = server.requests[0].prompt_tokens + server.requests[0].completion_tokens
        assert stopped.out.splitlines()[-2:] == [
            f"stopped: the agents have spent {spent:,} tokens, and max_agent_tokens is 1; go on with --resume NAME "
            "--max-agent-tokens N, where 0 is no cap",
            "resume with: python -m graph.run --resume run",
        ]
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
