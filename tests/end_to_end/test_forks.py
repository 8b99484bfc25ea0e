"""A fork works in a directory of its own, a cancelled run stops between layers, and two runs share the one model."""

import asyncio
import json
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from graph import persistence
from graph.build import builder
from graph.planning.plan import Plan
from graph.runs import steps
from graph.runs.directory import read_run
from graph.state import State
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    SAVE,
    Halt,
    fingerprint,
    fork,
    let_go,
    read_events,
    read_run_config,
    read_summary,
    read_trials,
    serve,
    start,
    wait_for,
)
from tools.base import rundir
from tools.workbench import open as workbench
from tools.workbench.evaluate import Evaluator
from tools.workbench.layer_pruning import LayerPruner


@contextmanager
def opened(run: Path) -> Iterator[tuple[Any, Any]]:
    """(the graph on the runs directory's state, the settings of the run's thread)."""
    thread, _ = read_run(run.parent, run.name)
    with persistence.open_saver(run.parent) as saver, persistence.open_store(run.parent) as store:
        yield builder().compile(checkpointer=saver, store=store), {"configurable": {"thread_id": thread}}


def fork_before(app: Any, settings: Any, node: str, iteration: int, values: dict[str, Any], after: str) -> Any:
    """Edit the state as it was before a node; the settings to go on from there."""
    history = app.get_state_history(settings)
    old = next(s for s in history if s.next == (node,) and s.values["iteration"] == iteration)
    return app.update_state(old.config, values, as_node=after)


def forks(run: Path) -> list[Path]:
    return sorted(path for path in run.parent.iterdir() if path.name.startswith(f"{run.name}-fork-"))


def test_a_fork_leaves_the_run_as_it_is(flags: list[str], tmp_path: Path, command: Command) -> None:
    assert command(*flags).code == 0
    run = tmp_path / "runs" / "run"
    before = fingerprint(run)
    with opened(run) as (app, settings):
        edited = fork_before(app, settings, "prune", 2, {"plan": Plan(sparsity=0.4, reason="mine")}, "plan")
        state = State.model_validate(app.invoke(None, edited, context=read_run_config(run), durability="sync"))
    assert fingerprint(run) == before
    (forked,) = forks(run)
    assert state.run == forked.name
    assert read_summary(forked)["run"] == forked.name
    assert state.trials[0] == State.model_validate(state).trials[0]
    assert state.trials[1].sparsity == pytest.approx(0.4, abs=5e-4)
    assert yaml.safe_load((forked / "config.yaml").read_text()) == yaml.safe_load((run / "config.yaml").read_text())
    past, fork_event = read_events(forked)[:-1], read_events(forked, "fork")
    assert [(event["from"], event["iteration"]) for event in fork_event] == [("run", 2)]
    place = past.index(fork_event[0])
    assert past[:place] == read_events(run)[:place]
    assert read_events(run)[place]["type"] == "node" and read_events(run)[place]["node"] == "prune"
    shared = [path for path in (forked / "artifacts").rglob("*.safetensors") if path.stat().st_nlink > 1]
    assert shared, "artifacts are not copied where links are possible"
    assert (forked / "artifacts" / "index.jsonl").stat().st_nlink == 1
    assert command("--resume", "run").out == "run run is finished: see runs/run/report.html\n"
    finished = f"run {forked.name} is finished: see runs/{forked.name}/report.html\n"
    assert command("--resume", forked.name).out == finished
    replayed = command("--replay", forked.name)
    assert f"note: the masks are those of run {forked.name} " in replayed.out, "its record is whole"


def test_a_fork_of_the_end_is_a_fork_too(flags: list[str], tmp_path: Path, command: Command) -> None:
    assert command(*flags).code == 0
    run = tmp_path / "runs" / "run"
    before = fingerprint(run)
    with opened(run) as (app, settings):
        app.update_state(settings, {"stop": ""}, as_node="reflect")
        app.invoke(None, settings, context=read_run_config(run), durability="sync")
    assert fingerprint(run) == before
    (forked,) = forks(run)
    assert read_summary(forked)["iterations"] == read_summary(run)["iterations"] + 1


def test_an_unfinished_run_and_its_fork_are_resumed_by_their_names(
    flags: list[str], easy: Path, tmp_path: Path, command: Command
) -> None:
    halt = Halt("validate", "tools.workbench.losses:evaluate_windows", 2)
    assert fork(tmp_path, *flags, halt=halt).finish().code == -signal.SIGKILL
    run = tmp_path / "runs" / "run"
    with opened(run) as (app, settings):
        edited = fork_before(app, settings, "prune", 1, {"plan": Plan(sparsity=0.2)}, "plan")
        app.invoke(None, edited, context=read_run_config(run), durability="sync", interrupt_before=["accept"])
    let_go()
    (forked,) = forks(run)
    original = command("--resume", "run")
    assert (original.code, original.err) == (0, "")
    assert read_trials(easy) == [tuple(trial.values())[:5] for trial in trials_of(run)]
    assert read_summary(run)["mask_sha256"] == read_summary(easy)["mask_sha256"]
    assert forks(run) == [forked]
    assert command("--resume", forked.name).code == 0
    assert trials_of(forked)[0]["sparsity"] == pytest.approx(0.2, abs=5e-4)
    assert read_summary(forked)["run"] == forked.name
    assert forks(run) == [forked]


def trials_of(run: Path) -> list[dict[str, Any]]:
    """The last event of every trial, with the figures of `read_trials` first."""
    last = {event["iteration"]: event for event in read_events(run, "trial") if event["iteration"]}
    names = ("iteration", "checkpoint", "perplexity", "kl", "verdict")
    return [{name: event[name] for name in names} | event for event in last.values()]


def test_an_edit_of_the_present_state_is_no_fork(
    flags: list[str], easy: Path, tmp_path: Path, command: Command
) -> None:
    assert (
        fork(tmp_path, *flags, halt=Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute")).finish().code
        < 0
    )
    run = tmp_path / "runs" / "run"
    with opened(run) as (app, settings):
        app.update_state(settings, {"plan": Plan(sparsity=0.35, reason="by hand")}, as_node="plan")
    assert command("--resume", "run").code == 0
    assert forks(run) == []
    assert trials_of(run)[0]["sparsity"] == pytest.approx(0.35, abs=5e-4)


def test_a_copied_thread_gets_its_own_directory(flags: list[str], tmp_path: Path, command: Command) -> None:
    assert fork(tmp_path, *flags, halt=Halt("validate", SAVE, 2)).finish().code == -signal.SIGKILL
    run = tmp_path / "runs" / "run"
    before = fingerprint(run)
    copy: Any = {"configurable": {"thread_id": str(uuid.uuid4())}}
    with opened(run) as (app, settings):
        last = app.get_state(settings)
        app.update_state(copy, last.values, as_node="validate")
        app.invoke(None, copy, context=read_run_config(run), durability="sync")
    assert fingerprint(run) == before
    (forked,) = forks(run)
    assert json.loads((forked / "run.json").read_text())["thread_id"] == copy["configurable"]["thread_id"]
    assert read_summary(forked)["status"] == "finished"


# In the server: coroutines around the same nodes


def test_a_cancelled_run_stops_before_its_next_layer_and_can_be_resumed(
    tiny_llama: Path, flags: list[str], easy: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("--list")  # at home
    compute, made, gate = LayerPruner.compute, 0, asyncio.Event()
    thread, config = str(uuid.uuid4()), read_run_config(easy)
    loop: asyncio.AbstractEventLoop | None = None
    cancelled = False

    def count(*arguments: Any) -> str:
        nonlocal made
        assert not cancelled, "no layer is begun after the run was cancelled"
        made += 1
        if made == 4:
            assert loop is not None
            loop.call_soon_threadsafe(gate.set)
            wait_for(lambda: cancelled)
        return compute(*arguments)

    async def cancel(app: Any) -> None:
        nonlocal loop, cancelled
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(start(app, "run", config, thread))
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled = True

    with monkeypatch.context() as patch:
        patch.setattr(LayerPruner, "compute", count)
        serve(tmp_path / "runs", cancel)
    assert made == 4
    run = tmp_path / "runs" / "run"
    assert not workbench._open, "model and directory are free"
    assert run.resolve() not in rundir._locks
    assert command("--resume", "run").code == 0
    assert read_trials(run) == read_trials(easy)
    assert read_summary(run)["mask_sha256"] == read_summary(easy)["mask_sha256"]


@pytest.mark.parametrize("at", ["in the last moment of a node", "between two nodes"])
def test_a_run_cancelled_where_no_layer_follows_is_free_for_the_command_line(
    at: str, easy: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("--list")  # at home
    config, run = read_run_config(easy), tmp_path / "runs" / "run"
    evaluate, task, calls, cancelled = Evaluator.evaluate, None, 0, threading.Event()
    between = at == "between two nodes"

    def end(*arguments: Any) -> Any:
        nonlocal calls
        evaluation = evaluate(*arguments)
        calls += arguments[2] == "validation"
        if calls == 1 and not between:
            assert task is not None
            task.get_loop().call_soon_threadsafe(task.cancel)
            cancelled.wait()
        return evaluation

    async def cancel(app: Any) -> None:
        nonlocal task
        task = asyncio.create_task(start(app, "run", config, str(uuid.uuid4())))
        if between:
            put = app.checkpointer.aput

            async def cancel_there(config: Any, checkpoint: Any, *rest: Any) -> Any:
                kept = await put(config, checkpoint, *rest)
                if "branch:to:validate" in checkpoint["updated_channels"]:
                    task.cancel()
                return kept

            app.checkpointer.aput = cancel_there
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", end)
        patch.setattr(steps, "IDLE_SECONDS", 2.0)
        serve(tmp_path / "runs", cancel)
    last = "prune" if between else "validate"
    assert read_events(run, "node")[-1]["node"] == last
    wait_for(lambda: run.resolve() not in rundir._locks)
    assert not workbench._open
    assert command("--resume", "run").code == 0
    assert read_summary(run)["mask_sha256"] == read_summary(easy)["mask_sha256"]


def test_a_run_that_waits_for_an_answer_is_free_for_the_command_line(
    easy: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("--list")  # at home
    run, config = tmp_path / "runs" / "run", read_run_config(easy).model_copy(update={"approve": "plans"})
    with monkeypatch.context() as patch:
        patch.setattr(steps, "IDLE_SECONDS", 2.0)
        serve(tmp_path / "runs", lambda app: start(app, "run", config, str(uuid.uuid4())))
    wait_for(lambda: run.resolve() not in rundir._locks)
    asked = command("--resume", "run")
    assert asked.code == 1
    assert "plan 1 waits for a person to accept, edit or refuse it" in asked.out + asked.err


def test_two_runs_at_once_do_not_fight_over_the_model(
    tiny_llama: Path, flags: list[str], easy: Path, tmp_path: Path, command: Command
) -> None:
    assert command(*flags, "--target-sparsity", "0.3", "--runs-dir", "alone").code == 0
    base = read_run_config(easy)
    configs = {"one": base, "two": base.model_copy(update={"target_sparsity": 0.3})}

    async def both(app: Any) -> list[State]:
        return await asyncio.gather(*(start(app, n, c, str(uuid.uuid4())) for n, c in configs.items()))

    serve(tmp_path / "runs", both)
    alone = {"one": easy, "two": tmp_path / "alone" / "run"}
    for name, run in alone.items():
        assert read_summary(tmp_path / "runs" / name)["mask_sha256"] == read_summary(run)["mask_sha256"]
    assert not workbench._open
