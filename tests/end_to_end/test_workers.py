"""Runs whose work is shared by workers on Ray: the same result, stopped, resumed alone or with them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import python_environment, read_events, read_summary, read_trials, wait_for

WORKERS = ("--workers", "2", "--worker-threads", "1")


def processes_of(directory: Path) -> list[str]:
    """Command lines of processes that work in `directory`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == directory:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_run_with_workers_is_interrupted_and_goes_on_alone(
    flags: list[str], easy: Path, tmp_path: Path, command: Command
) -> None:
    arguments = [sys.executable, "-W", "error", "-m", "graph.run", *flags, *WORKERS]
    environment = python_environment(BILLHOOK_RUNS_DIR=str(tmp_path / "runs"))
    home = tmp_path / "home"
    home.mkdir()
    running = subprocess.Popen(
        arguments, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = tmp_path / "runs" / "run"
    wait_for(lambda: (run / "events.jsonl").is_file() and len(read_events(run, "trial")) > 1, 240)
    assert any("raylet" in line for line in processes_of(home))
    os.kill(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (1, "") and "--resume run" in out
    assert wait_for(lambda: processes_of(home) == [])
    assert not (run / "summary.json").exists()
    assert command("--resume", "run", "--workers", "").code == 0
    shared, alone = read_summary(run), read_summary(easy)
    assert shared["mask_sha256"] == alone["mask_sha256"] and shared["perplexity"] == alone["perplexity"]
    assert read_trials(run) == read_trials(easy)


def test_workers_that_there_cannot_be(flags: list[str], command: Command) -> None:
    refused = command(*flags, "--workers", "many")
    assert refused.code == 2 and "workers" in refused.err and refused.err.count("\n") == 1
