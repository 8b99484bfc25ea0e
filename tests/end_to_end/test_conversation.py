"""A conversation that is killed between any two of its calls: no reply is paid twice, no probe measured twice."""

import asyncio
import json
import re
import signal
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graph.config import RunConfig
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    NOTE,
    TINY,
    Halt,
    fork,
    read_events,
    read_run_config,
    read_state,
    read_summary,
    read_trials,
    serve,
    start,
    wait_for,
)
from tests.openai_server import Answer, Body, OpenAIServer
from tests.tiny import tiny_settings
from tools.base import rundir
from tools.plans.costs import count_in_order, count_walk
from tools.workbench import open as workbench
from tools.workbench.layer_pruning import LayerPruner

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
            assert kills < 20, "it comes no further"
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


# In the server: coroutines around the same nodes


def config_of(model: Path, server: OpenAIServer) -> RunConfig:
    agents = {"planner": server.planner("fine"), "max_iterations": 1, "memory": False}
    return RunConfig.model_validate(tiny_settings(model).model_dump() | agents)


def test_a_planner_that_thinks_keeps_no_other_run_from_the_model(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    command("--list")  # at home
    script = iter([{"tool": "probe", "arguments": {"plan": PROBE, "tokens": 64}}, PROBE])
    over = threading.Event()

    def think(_body: Body) -> Answer:
        assert over.wait(30), "the other run waits for this one"
        return next(script)

    async def work(app: Any) -> None:
        thinking = asyncio.create_task(start(app, "thinking", config, str(uuid.uuid4())))
        await asyncio.to_thread(wait_for, lambda: server.requests)
        assert tmp_path / "runs" / "thinking" in rundir._locks
        other = config.model_copy(update={"planner": "heuristic", "target_sparsity": 0.3})
        await start(app, "other", other, str(uuid.uuid4()))
        assert tmp_path / "runs" / "thinking" in rundir._locks, "nobody else takes it up meanwhile"
        over.set()
        await thinking

    with OpenAIServer(think) as server:
        config = config_of(tiny_llama, server)
        serve(tmp_path / "runs", work)
    assert not workbench._open and not rundir._locks
    with OpenAIServer([{"tool": "probe", "arguments": {"plan": PROBE, "tokens": 64}}, PROBE]) as server:
        serve(tmp_path / "runs", lambda app: start(app, "alone", config_of(tiny_llama, server), str(uuid.uuid4())))
    runs = [tmp_path / "runs" / name for name in ("thinking", "alone")]
    assert read_trials(runs[0]) == read_trials(runs[1])
    assert len({str(read_events(run, "tool")[0]["answer"]) for run in runs}) == 1
    assert len({read_summary(run)["mask_sha256"] for run in runs}) == 1


def test_a_probe_that_is_cancelled_in_studio_is_made_again_and_what_was_paid_for_stands(
    tiny_llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("--list")  # at home
    compute, cancelled, begun = LayerPruner.compute, threading.Event(), threading.Event()

    def hang(*arguments: Any) -> Any:
        assert not cancelled.is_set(), "no layer is begun after the run was cancelled"
        begun.set()
        assert cancelled.wait(30)
        return compute(*arguments)

    async def cancel(app: Any) -> None:
        running = asyncio.create_task(start(app, "run", config, str(uuid.uuid4())))
        await asyncio.to_thread(wait_for, begun.is_set)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert workbench._open, "the probe is still at work"
        cancelled.set()

    with OpenAIServer(PLANNER[1:]) as server:
        config = config_of(tiny_llama, server)
        with monkeypatch.context() as patch:
            patch.setattr(LayerPruner, "compute", hang)
            serve(tmp_path / "runs", cancel)
        assert not workbench._open and not rundir._locks
        assert command("--resume", "run").code == 0
    run = tmp_path / "runs" / "run"
    assert len(server.requests) == len(PLANNER[1:]) == read_state(run).usage.calls
    state, config = read_state(run), read_run_config(run)
    probed, walked, planned = state.counted
    assert (probed, planned) == ("curves of wanda~dense", "curves of refit"), "of the probe, then of the plan"
    assert walked.startswith("walk of order "), "behind the probe's pruned predecessors"
    walks = 2 * count_walk(config) + count_in_order(["sequential"], config)
    assert state.evaluated_tokens == 64 + state.trials[0].tokens + walks
