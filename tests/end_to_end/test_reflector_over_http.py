"""Whole runs with a reflector's model: its lessons move the next allocation, it may stop a run, and it may fail."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from graph.memory.__main__ import main as memory
from graph.memory.notes import read_notes
from graph.persistence import open_store
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, Halt, fork, read_events, read_state, read_summary, read_trials
from tests.openai_server import OpenAIServer

DEAR = {
    **{"selector": "*.v_proj", "direction": "dearer", "multiplier": 2.0, "confidence": 0.9},
    "evidence": "The values took most of the sparsity.",
}
NOTHING: dict[str, Any] = {"lessons": []}


def flags(model: Path, server: OpenAIServer, behaviour: str = "model", *more: str) -> list[str]:
    return [
        *("--name", "run", "--model", str(model), "--reflector", server.planner(behaviour), *TINY),
        *("--agent-timeout", "5", "--agent-retries", "0", "--max-iterations", "3", "--tau", "9", "--patience", "9"),
        *("--validation-windows", "12"),  # the first trial is a surprise beyond the noise
        *more,
    ]


def plans_of(run: Path) -> list[dict[str, Any]]:
    return [event["details"] for event in read_events(run, "plan")]


def nodes_of(run: Path) -> list[str]:
    return [event["node"] for event in read_events(run, "node")]


def test_what_a_reflector_says_moves_the_next_allocation(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "runs" / "run"
    with OpenAIServer([{"lessons": [DEAR]}, NOTHING]) as server:
        given = flags(tiny_llama, server)
        assert command(*given).code == 0
        asked = [request.messages for request in server.requests]
    first, second, _ = plans_of(run)
    assert (first["multipliers"], list(second["multipliers"])) == ({}, ["self_attn.v_proj"])
    assert 1 < second["multipliers"]["self_attn.v_proj"] < 2
    lines = [trial.plan for trial in read_state(run).trials]
    assert " · lessons x1 (" in lines[1] and "lessons" not in lines[0]
    assert f"plan: {lines[1]}" in asked[1][1]["content"]
    layers = next(event for event in read_events(run, "layers") if event["checkpoint"] == read_trials(run)[1][1])
    shares = dict(zip(layers["names"], layers["sparsity"], strict=True))
    with OpenAIServer([NOTHING]) as server:
        assert command("--runs-dir", "without", *flags(tiny_llama, server)).code == 0
    without = read_events(tmp_path / "without" / "run", "layers")[1]
    assert layers["names"] == without["names"]
    values = [i for i, name in enumerate(layers["names"]) if name.endswith("v_proj")]
    assert sum(shares[layers["names"][i]] for i in values) < sum(without["sparsity"][i] for i in values)
    kinds = {event["type"] for event in read_events(run)}
    assert {"prompt", "reply", "usage", "reflection", "lesson"} <= kinds
    state = read_state(run)
    assert state.usage.calls == len(asked) == 3
    assert [lesson.source for lesson in state.lessons if lesson.selector == "self_attn.v_proj"] == ["reflector"]


def test_a_run_that_was_killed_goes_on_with_the_same_multipliers(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    note = {"text": "Leave the values more.", "trials": [1, 2]}
    script = {1: {"lessons": [DEAR]}, 2: {"lessons": [], "note": note}, 3: NOTHING}

    def reflect(body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["messages"][-1]["content"]
        return script[int(prompt.rsplit("Reflect on round ", 1)[1].rstrip("."))]

    with OpenAIServer(reflect) as server:
        given = flags(tiny_llama, server)
        assert command("--runs-dir", "easy", *given).code == 0
        for halt in (
            Halt("reflect", "graph.nodes.reflect:choose_reflection", after=True),
            Halt("reflect", "graph.nodes.reflect:write_lesson", 1, after=True),
            Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 3),
        ):
            assert fork(tmp_path, *given, halt=halt).finish().code == -signal.SIGKILL
            given = ["--resume", "run"]
        assert command("--resume", "run").code == 0
    run, easy = tmp_path / "runs" / "run", tmp_path / "easy" / "run"
    assert read_trials(run) == read_trials(easy)
    assert read_state(run).lessons == read_state(easy).lessons
    assert [x.trials for x in read_state(run).notes] == [[1, 2]] and read_state(run).notes == read_state(easy).notes
    with open_store(tmp_path / "runs") as store:
        assert read_notes(store, read_state(run).config, "next") == read_state(run).notes
    assert plans_of(run)[-2:] == plans_of(easy)[-2:]
    assert read_summary(run)["mask_sha256"] == read_summary(easy)["mask_sha256"]


def test_a_reflector_stops_a_run_at_the_target_and_not_before(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    with OpenAIServer([{"stop": True, "reason": "nothing more to win"}]) as server:
        done = command(*flags(tiny_llama, server))
    assert (done.code, done.err) == (0, "")
    run = tmp_path / "runs" / "run"
    assert "note: the reflector would stop, but the target is not reached yet: nothing more to win\n" in done.out
    assert read_state(run).stop == "at the target, the reflector stops: nothing more to win"
    assert read_state(run).judged == {1: "nothing more to win", 2: "nothing more to win"}, "which planners are told"
    assert (read_summary(run)["iterations"], read_summary(run)["status"]) == (2, "finished")


def test_a_reflector_has_the_weights_profiled_again(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    with OpenAIServer([{"reprofile": True, "reason": "they have changed"}, NOTHING]) as server:
        done = command(*flags(tiny_llama, server))
    assert done.code == 0
    assert "note: the reflector asks for a new profile: they have changed\n" in done.out
    nodes = nodes_of(tmp_path / "runs" / "run")
    assert nodes[:7] == ["profile", "plan", "prune", "validate", "accept", "reflect", "profile"]
    assert nodes.count("profile") == 2


def test_an_unreachable_reflector_stops_the_run_and_a_resume_goes_on_there(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "runs" / "run"
    with OpenAIServer([NOTHING]) as server:
        given = flags(tiny_llama, server)
        port = int(server.url.split(":")[2].split("/")[0])
    stopped = command(*given)
    assert (stopped.code, stopped.err) == (1, "")
    assert f"stopped: openai:model at {server.url} cannot be reached or hung up" in stopped.out
    assert nodes_of(run)[-1] == "reflect"
    with OpenAIServer([NOTHING], port=port):
        assert command("--resume", "run").code == 0
    assert read_summary(run)["status"] == "finished"


def test_the_fallback_of_the_planner_is_the_reflectors_too(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    with OpenAIServer() as server:
        done = command(*flags(tiny_llama, server, "unavailable", "--planner-fallback", "heuristic"))
    assert (done.code, done.err) == (0, "")
    warnings = [event["text"] for event in read_events(tmp_path / "runs" / "run", "warning")]
    assert len(warnings) == 3
    assert all(text.endswith("; the rule alone reflects on this round") for text in warnings)
    assert all(lesson.source == "measured" for lesson in read_state(tmp_path / "runs" / "run").lessons)


def test_memory_is_told_at_the_start_and_can_be_left_out(
    tiny_llama: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = ["--model", str(tiny_llama), *TINY, "--max-iterations", "1"]
    assert command("--name", "silent", "--no-memory", *rule).code == 0
    assert memory(["list"]) == 0
    assert capsys.readouterr().out == "no lessons in runs\n"
    for name in ("first", "second"):
        assert command("--name", name, *rule, "--target-sparsity", "0.3" if name == "first" else "0.4").code == 0
    third = command("--name", "third", *rule)
    assert "2 lessons from 2 earlier runs\n" in third.out
    assert "lesson from" not in command("--name", "fourth", "--no-memory", *rule).out
    assert memory(["list"]) == 0
    assert capsys.readouterr().out == f"{tiny_llama}: 3 lessons from 3 runs\n"
    assert memory(["show", str(tiny_llama)]) == 0
    shown = capsys.readouterr().out.splitlines()[1:]
    grounds = [re.search(r" with two-sided (at .*) \(1 observation", line) for line in shown]
    assert [ground and ground[1] for ground in grounds] == [f"at {x}% on pydoc" for x in ("20.0", "26.7", "30.0")]


@pytest.mark.parametrize("behaviour", ["prose", "refusal"])
def test_a_reflector_that_says_nothing_usable_stops_the_run(behaviour: str, tiny_llama: Path, command: Command) -> None:
    with OpenAIServer() as server:
        stopped = command(*flags(tiny_llama, server, behaviour))
    assert stopped.code == 1
    assert stopped.out.splitlines()[-1] == "resume with: python -m graph.run --resume run"
