"""A conversation that is killed between any two of its calls: no reply is paid twice, no probe measured twice."""

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import NOTE, TINY, Halt, fork, read_events, read_state, read_summary, read_trials
from tests.openai_server import Answer, Body, OpenAIServer

PROBE = {"sparsity": 0.45, "recipe": {"method": "wanda", "refit": False}}
LEARNT = {"selector": "*.v_proj", "direction": "dearer", "multiplier": 1.5, "confidence": 0.5, "evidence": "figures"}
PLANNER: list[Answer] = [
    {"tool": "predict", "arguments": {"plan": {"sparsity": 0.45, "recipe": {"curves": "method"}}}},
    [
        {"tool": "probe", "arguments": {"plan": PROBE, "tokens": 64}},
        {"tool": "history", "arguments": {"n": 3}},
    ],
    {"sparsity": 45, "reason": "a percentage"},
    {"sparsity": 0.45, "reason": "all at once"},
]
REFLECTOR: list[Answer] = [{"lessons": [LEARNT | {"multiplier": 9}]}, {"lessons": [LEARNT], "reason": "v_proj"}]
UNSTEADY = {"time", "seconds", "seconds_left", "planner", "reflector"}
"""Fields of events that differ between two runs of the same work: endpoints have other ports."""


@dataclass
class Life:
    """What a run came to, and what its endpoints were asked."""

    run: Path
    kills: int
    requests: list[list[str]]
    """Of the planner's endpoint and the reflector's: the messages of every request, in order."""

    @property
    def result(self) -> tuple[Any, ...]:
        state = read_state(self.run)
        return (
            self.requests,
            read_trials(self.run),
            state.usage,
            state.evaluated_tokens,
            state.lessons,
            read_summary(self.run)["mask_sha256"],
        )

    @property
    def events(self) -> list[dict[str, Any]]:
        """The run's log, without when it began and which node was entered how often."""
        events = [event for event in read_events(self.run) if event["type"] not in ("start", "node", "result")]
        return [{name: value for name, value in event.items() if name not in UNSTEADY} for event in events]


def steady(messages: list[Body]) -> str:
    """What was said, without the seconds that tools have left."""
    return re.sub(r"(seconds_left\W+)\d+", r"\1", json.dumps(messages))


def live(home: Path, model: Path, halt: Halt | None = None) -> Life:
    """A run of one round that is killed at `halt`, and each time it is resumed again, until it ends.

    The planner's endpoint refuses three methods before it takes the fourth.
    """
    home.mkdir()
    with OpenAIServer(PLANNER) as planner, OpenAIServer(REFLECTOR) as reflector:
        given = ["--name", "run", "--model", str(model), *TINY, "--max-iterations", "1", "--no-memory"]
        given += ["--planner", planner.planner("bare"), "--reflector", reflector.planner("fine")]
        kills = 0
        while (done := fork(home, *given, halt=halt, NO_PROXY="127.0.0.1").finish()).code == -signal.SIGKILL:
            given = ["--resume", "run"]
            kills += 1
        assert (done.code, done.err) == (0, ""), done.out
        asked = [[steady(request.messages) for request in server.requests] for server in (planner, reflector)]
    return Life(home / "runs" / "run", kills, asked)


@pytest.fixture(scope="module")
def easy(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The run that nothing happened to."""
    return live(tmp_path_factory.mktemp("easy") / "home", tiny_llama)


@pytest.mark.parametrize(
    ("halt", "kills"),
    [
        (Halt("plan", NOTE, after=True), 9),
        (Halt("reflect", NOTE, after=True), 4),
        (Halt("plan", "graph.runs.session:append_event", 2, after=True), 7),
    ],
    ids=["tasks of the plan", "tasks of the reflection", "events"],
)
def test_killed_between_any_two(halt: Halt, kills: int, easy: Life, tiny_llama: Path, tmp_path: Path) -> None:
    """After every task has been saved and before it is logged; then after every second event."""
    life = live(tmp_path / "home", tiny_llama, halt)
    assert life.kills == kills
    assert life.result == easy.result
    assert life.events == easy.events


def test_a_conversation_that_leads_nowhere_is_begun_anew_when_the_run_is_resumed(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    script: list[Answer] = [{"tool": "history", "arguments": {"n": 1}}, {"sparsity": 0.45}]
    with OpenAIServer(script) as server:
        given = ["--name", "run", "--model", str(tiny_llama), *TINY, "--max-iterations", "1", "--no-memory"]
        stopped = command(*given, "--planner", server.planner("short-memory"))
        assert stopped.code == 1
        assert "short-memory at" in stopped.out and "cannot take so long a prompt" in stopped.out
        assert command("--resume", "run").code == 0
    assert [request.status for request in server.requests] == [200, 400, 400, 200]
    first, _, _, last = server.requests
    assert '"calls_left": 6' in first.messages[1]["content"]
    assert '"calls_left": 5' in last.messages[1]["content"], "the budget is the round's"
    run = tmp_path / "runs" / "run"
    assert read_state(run).usage.calls == len(read_events(run, "reply")) == 2
