"""Runs that are killed, interrupted, damaged or contended, and then resumed: the result is that of an easy life."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    SAVE,
    TINY,
    Halt,
    assert_same_weights,
    at_home,
    fork,
    python_environment,
    read_events,
    read_state,
    read_summary,
    read_trials,
    run_here,
    wait_for,
)
from tools.base.rundir import LAST

HALTS = [
    Halt("profile", SAVE),
    Halt("plan", "graph.nodes.plan:choose_plan", 2, after=True),
    Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 5),
    Halt("validate", "tools.workbench.losses:evaluate_windows", after=True),
    Halt("accept", "tools.workbench.prune:Pruner.forget", 2, after=True),
    Halt("rollback", "tools.workbench.weights:Weights.install", 5, after=True),
    Halt("reflect", "graph.nodes.reflect:write_lesson", 2),
    Halt("finish", "graph.nodes.finish:export_model", after=True),
]
"""One moment of every node; `python -m tests.kill_campaign` kills at random ones."""


def name_halt(halt: Halt) -> str:
    return f"{halt.node}-{'after' if halt.after else 'before'}-{halt.target.rsplit('.', 1)[-1].split(':')[-1]}"


@dataclass
class Easy:
    """A run that nothing happened to, and the flags that made it."""

    run: Path
    flags: list[str]


@pytest.fixture(scope="module")
def easy(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Easy]:
    """Three rounds: two that are accepted, one that is rolled back."""
    flags = ["--name", "run", "--model", str(tiny_llama), *TINY]
    home = tmp_path_factory.mktemp("easy")
    with at_home(home):
        assert run_here(*flags) == 0
    run = home / "runs" / "run"
    assert [verdict for *_, verdict in read_trials(run)] == ["accept", "accept", "rollback"]
    return Easy(run, flags)


def assert_same(run: Path, easy: Easy) -> None:
    """The same trials, lessons, masks and weights as the run that nothing happened to."""
    assert read_trials(run) == read_trials(easy.run)
    assert read_state(run).lessons == read_state(easy.run).lessons
    changing = {"seconds": 0, "peak_memory_bytes": 0}
    assert read_summary(run) | changing == read_summary(easy.run) | changing
    assert_same_weights(run, easy.run)
    leftovers = [path.name for path in run.rglob(".*") if path.name not in (".lock", LAST)]
    assert not leftovers, "files that were being written are cleared away"


@pytest.mark.parametrize("halt", HALTS, ids=name_halt)
def test_killed_and_resumed(halt: Halt, easy: Easy, tmp_path: Path, command: Command) -> None:
    killed = fork(tmp_path, *easy.flags, halt=halt).finish()
    run = tmp_path / "runs" / "run"
    assert killed.code == -signal.SIGKILL, killed.err
    assert read_events(run, "node")[-1]["node"] == halt.node
    resumed = command("--resume", "run")
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.out.startswith("resumed run: ")
    assert_same(run, easy)


def test_killed_before_there_was_a_run(easy: Easy, tmp_path: Path, command: Command) -> None:
    halt = Halt("", "graph.runs.directory:write_json")
    assert fork(tmp_path, *easy.flags, halt=halt).finish().code == -signal.SIGKILL
    assert command("--resume", "run").err == "error: there is no run 'run' in runs; see --list\n"
    assert command(*easy.flags).code == 0
    assert_same(tmp_path / "runs" / "run", easy)


def test_killed_again_and_again(easy: Easy, tmp_path: Path, command: Command) -> None:
    given = easy.flags
    for halt in (HALTS[i] for i in (0, 2, 5)):
        assert fork(tmp_path, *given, halt=halt).finish().code == -signal.SIGKILL
        given = ["--resume", "run"]
    assert command("--resume", "run").code == 0
    assert_same(tmp_path / "runs" / "run", easy)


def test_control_c_ends_after_the_present_step_and_says_how_to_go_on(
    easy: Easy, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "elsewhere" / "run"
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "graph.run", *easy.flags, "--runs-dir", "elsewhere"],
        cwd=tmp_path,
        env=python_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: process.poll() is not None or read_events(run, "node"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert "stopping at the next layer, window of text or step" in out
    stopped, how = out.splitlines()[-2:]
    assert stopped.startswith("stopped: stopped as asked, ")
    assert how == "resume with: python -m graph.run --resume run --runs-dir elsewhere"
    assert command("--resume", "run", "--runs-dir", "elsewhere").code == 0
    assert_same(run, easy)


def test_a_second_control_c_does_not_wait_for_the_step(easy: Easy, tmp_path: Path, command: Command) -> None:
    work = fork(
        tmp_path, *easy.flags, halt=Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 5, kind="hang")
    )
    run = tmp_path / "runs" / "run"
    wait_for(lambda: "prune" in [event["node"] for event in read_events(run, "node")])
    time.sleep(0.3)
    os.kill(work.process.pid, signal.SIGINT)
    wait_for(lambda: "stopping at the next layer" in work.read("out"))
    os.kill(work.process.pid, signal.SIGINT)
    done = work.finish(timeout=20)
    assert (done.code, done.err) == (1, "")
    assert done.out.splitlines()[-2:] == ["stopped: interrupted", "resume with: python -m graph.run --resume run"]
    assert command("--resume", "run").code == 0
    assert_same(run, easy)


def test_two_processes_cannot_work_in_one_run(easy: Easy, tmp_path: Path, command: Command) -> None:
    work = fork(
        tmp_path, *easy.flags, halt=Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 5, kind="hang")
    )
    run = tmp_path / "runs" / "run"
    try:
        wait_for(lambda: "prune" in [event["node"] for event in read_events(run, "node")])
        before = (run / "events.jsonl").read_bytes()
        second = command("--resume", "run")
        assert (second.code, second.out) == (2, "")
        assert re.fullmatch(r"error: another process is working in \S+/runs/run; [^\n]*\n", second.err)
        assert (run / "events.jsonl").read_bytes() == before
        third = command(*easy.flags)
        assert third.code == 2 and "run 'run' exists already" in third.err
    finally:
        work.kill()
    assert command("--resume", "run").code == 0
    assert_same(run, easy)


# Damage


def stop_in(node: str, target: str, easy: Easy, home: Path, count: int = 1) -> Path:
    """A run that was killed there; its directory."""
    assert fork(home, *easy.flags, halt=Halt(node, target, count)).finish().code == -signal.SIGKILL
    return home / "runs" / "run"


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def artifact(run: Path, digest: str, suffix: str) -> Path:
    return run / "artifacts" / digest[:2] / f"{digest}{suffix}"


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_layer_is_named_and_made_again(damage: str, easy: Easy, tmp_path: Path, command: Command) -> None:
    run = stop_in("rollback", "tools.workbench.weights:Weights.install", easy, tmp_path)
    manifest = artifact(run, read_state(run).accepted, ".json").read_text()
    digest = re.search(r'down_proj": \{"artifact": "(\w+)"', manifest)
    assert digest is not None
    layer = artifact(run, digest[1], ".safetensors")
    whole = layer.read_bytes()
    if damage == "flipped":
        flip_byte(layer)
    elif damage == "cut":
        layer.write_bytes(whole[: len(whole) // 2])
    else:
        layer.unlink()
    resumed = command("--resume", "run")
    assert resumed.code == 0
    kind = "is missing" if damage == "gone" else "is damaged"
    (warning,) = [line for line in resumed.out.splitlines() if line.startswith("warning: ")]
    assert f"{layer.name} {kind}" in warning
    assert re.search(r"; layer model\.layers\.\d\.mlp\.down_proj is computed again$", warning)
    assert layer.read_bytes() == whole
    assert_same(run, easy)


@pytest.mark.parametrize("what", ["manifest", "profile"])
def test_what_cannot_be_made_again_is_named_and_refused(
    what: str, easy: Easy, tmp_path: Path, command: Command
) -> None:
    run = stop_in("validate", "tools.workbench.losses:evaluate_windows", easy, tmp_path)
    state = read_state(run)
    file = artifact(run, state.current if what == "manifest" else state.profile, ".json")
    flip_byte(file)
    resumed = command("--resume", "run")
    assert (resumed.code, resumed.err) == (1, "")
    assert re.search(rf"^stopped: artifact \S*{file.name} is damaged: ", resumed.out, re.MULTILINE)
    assert not (run / "summary.json").exists()


def test_a_torn_line_of_the_index_costs_nothing_but_time(easy: Easy, tmp_path: Path, command: Command) -> None:
    run = stop_in("prune", "tools.workbench.layer_pruning:LayerPruner.compute", easy, tmp_path, count=9)
    index = run / "artifacts" / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    assert command("--resume", "run").code == 0
    assert_same(run, easy)


@pytest.mark.parametrize("content", ["", '{"nll": [1.0', '{"nll": [1.0, 1.0], "kl": []}'])
def test_a_damaged_evaluation_is_measured_again(content: str, easy: Easy, tmp_path: Path, command: Command) -> None:
    run = stop_in("accept", "tools.workbench.prune:Pruner.forget", easy, tmp_path)
    (file,) = (run / "evaluations").iterdir()
    file.write_text(content)
    assert command("--resume", "run").code == 0
    assert_same(run, easy)


# Refusals


def test_a_changed_config_is_refused_by_its_fields(easy: Easy, tmp_path: Path, command: Command) -> None:
    run = stop_in("plan", SAVE, easy, tmp_path)
    flags = command("--resume", "run", "--tau", "0.2", "--target-sparsity", "0.5")
    assert (flags.code, flags.out) == (2, "")
    assert flags.err == (
        "error: run 'run' cannot be resumed with a changed config (target_sparsity, tau); start a new run\n"
    )
    config = run / "config.yaml"
    written = config.read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(written.replace("window: 64", "window: 128"))
    given = command("--resume", "run", "--config", "mine.yaml")
    assert given.code == 2 and "changed config (window)" in given.err
    config.write_text(written.replace("seed: 0", "seed: 1"))
    edited = command("--resume", "run")
    assert (edited.code, edited.out) == (2, "")
    assert edited.err.startswith(
        "error: run 'run' cannot be read: its config.yaml is not what the run was begun with (seed)"
    )
    config.write_text(written.replace("seed: 0", "sed: 0"))
    assert command("--resume", "run").err == edited.err
    config.write_text(written)
    file.write_text(written)
    assert command("--resume", "run", "--config", "mine.yaml", "--tau", "0.15").code == 0
    assert_same(run, easy)


def test_a_copy_of_a_run_is_not_begun_again_in_its_place(easy: Easy, tmp_path: Path, command: Command) -> None:
    run = stop_in("plan", SAVE, easy, tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "copy")
    before = (run / "events.jsonl").read_bytes()
    done = command("--resume", "copy")
    assert (done.code, done.out) == (2, "")
    assert "copy is a copy of run 'run', or was once called so, and its checkpoints are that run's; " in done.err
    assert (run / "events.jsonl").read_bytes() == before
    assert command("--resume", "run", "--agent-timeout", "30").code == 0
    assert_same(run, easy)


def test_a_finished_run_is_not_run_again(easy: Easy, tmp_path: Path, command: Command) -> None:
    before = {path: path.stat().st_mtime_ns for path in easy.run.rglob("*") if path.is_file()}
    done = command("--resume", "run", "--runs-dir", str(easy.run.parent))
    assert (done.code, done.err) == (0, "")
    assert done.out == f"run run is finished: see {easy.run / 'report.html'}\n"
    assert {path: path.stat().st_mtime_ns for path in easy.run.rglob("*") if path.is_file()} == before
