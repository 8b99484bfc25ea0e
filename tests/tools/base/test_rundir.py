"""The lock of a run directory, over two processes and over threads; and the log, without secrets."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tools.base.errors import DamagedFile, UserError
from tools.base.files import write_json
from tools.base.rundir import (
    FORMAT,
    LAST,
    RUNS_DIR_VARIABLE,
    append_event,
    check_log,
    lock_run,
    read_config_values,
    read_made,
    rewrite_log,
    runs_directory,
    scan_events,
    unlock_run,
    unlock_runs,
)

ROOT = Path(__file__).resolve().parents[3]
LOCK = "import sys, pathlib; from tools.base.rundir import lock_run; lock_run(pathlib.Path(sys.argv[1])); "


@contextmanager
def other_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its standard input is closed."""
    code = LOCK + "print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def is_free_for_another_process(directory: Path) -> bool:
    command = [sys.executable, "-c", LOCK, str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0 or "another process is working in" in result.stderr
    return result.returncode == 0


def test_two_processes_cannot_work_in_one_directory(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "demo"
    with other_process(directory):
        with pytest.raises(UserError) as refusal:
            lock_run(directory)
        assert str(refusal.value) == f"another process is working in {directory}; wait for it, or use another --name"
        lock_run(tmp_path / "runs" / "other")
    unlock_run(tmp_path / "runs" / "other")


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock_run(tmp_path)
        unlock_run(tmp_path)


def test_our_own_lock_keeps_others_out_until_it_is_given_back(tmp_path: Path) -> None:
    lock_run(tmp_path)
    lock_run(tmp_path / "." / "..")  # another directory
    lock_run(tmp_path)  # ours already
    assert not is_free_for_another_process(tmp_path)
    unlock_run(tmp_path)
    assert is_free_for_another_process(tmp_path)
    unlock_runs()
    lock_run(tmp_path)
    assert is_free_for_another_process(tmp_path.parent)
    unlock_run(tmp_path)


def test_a_lock_taken_in_one_thread_is_given_back_in_another(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:  # whose thread lives on, as those of a server do
        pool.submit(lock_run, tmp_path).result()
        unlock_run(tmp_path)
        assert is_free_for_another_process(tmp_path)
        lock_run(tmp_path)
        unlock_run(tmp_path)


def read_events(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def test_events_are_appended_one_a_line(tmp_path: Path) -> None:
    append_event(tmp_path, {"type": "node", "text": "two\nlines, naïve"})
    append_event(tmp_path, {"type": "metric", "value": 0.5, "where": tmp_path})
    first, second = read_events(tmp_path)
    assert first["text"] == "two\nlines, naïve"
    assert second["where"] == str(tmp_path)
    assert isinstance(first["time"], float) and isinstance(second["time"], float)
    assert first["time"] <= second["time"]


def test_an_event_does_not_stick_to_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    append_event(tmp_path, {"type": "node", "text": "whole"})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "type": "rep')
    append_event(tmp_path, {"type": "node", "text": "after"})
    lines = (tmp_path / "events.jsonl").read_text().split("\n")
    assert (len(lines), lines[1], lines[3]) == (4, '{"time": 1.0, "type": "rep', "")
    assert [event["text"] for _, event in scan_events(tmp_path, "node")] == ["whole", "after"]


@pytest.mark.parametrize(
    "secret", ["sk-proj-abcdef123456", "plain-token-value", 'with "quotes" and \\', "Schlüssel-äöü"]
)
def test_keys_never_reach_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    append_event(
        tmp_path, {"type": "error", "text": f"401: bad key {secret}", "nested": {"header": [f"Bearer {secret}"]}}
    )
    content = (tmp_path / "events.jsonl").read_text(encoding="utf-8")
    assert secret not in content and json.dumps(secret)[1:-1] not in content
    assert read_events(tmp_path)[0]["text"] == "401: bad key [key]"


def test_a_key_that_begins_like_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_API_KEY", "abcdefgh")
    monkeypatch.setenv("HF_TOKEN", "abcdefghijklmnop")
    append_event(tmp_path, {"text": "abcdefghijklmnop and abcdefgh"})
    assert read_events(tmp_path)[0]["text"] == "[key] and [key]"


def test_events_of_a_type_are_found_by_their_lines(tmp_path: Path) -> None:
    assert scan_events(tmp_path, "usage") == []
    for type_ in ("usage", "note", "usage"):
        append_event(tmp_path, {"type": type_, "text": '"type": "usage"' * 20})
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"time": 1.0, "type": "usage", "ca')
    assert [(number, event["type"]) for number, event in scan_events(tmp_path, "usage")] == [(0, "usage"), (2, "usage")]


@pytest.mark.parametrize("value", ["", None])
def test_runs_directory_defaults_to_runs(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(RUNS_DIR_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(RUNS_DIR_VARIABLE, value)
    assert runs_directory() == Path("runs")


def make_log(directory: Path) -> list[bytes]:
    """The lines of a log of four trials."""
    for number in range(4):
        append_event(directory, {"type": "trial", "iteration": number})
    return (directory / "events.jsonl").read_bytes().splitlines(keepends=True)


def test_a_log_that_was_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    whole = b"".join(make_log(tmp_path))
    check_log(tmp_path)
    for end in range(len(whole) - 1):
        (tmp_path / "events.jsonl").write_bytes(whole[:end])
        with pytest.raises(DamagedFile, match=r"is damaged: what was written last is missing; put it back"):
            check_log(tmp_path)
    (tmp_path / "events.jsonl").unlink()
    with pytest.raises(DamagedFile, match=r"what was written last is missing"):
        check_log(tmp_path)


def test_what_a_crash_leaves_of_a_log_is_whole(tmp_path: Path) -> None:
    make_log(tmp_path)
    noted = (tmp_path / LAST).read_bytes()
    append_event(tmp_path, {"type": "trial", "iteration": 4})
    (tmp_path / LAST).write_bytes(noted)  # a line that was not noted yet
    check_log(tmp_path)
    append_event(tmp_path, {"type": "trial", "iteration": 5})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "type": "tri')
    check_log(tmp_path)
    append_event(tmp_path, {"type": "trial", "iteration": 6})
    check_log(tmp_path)
    assert [event["iteration"] for _, event in scan_events(tmp_path, "trial")] == list(range(7))


@pytest.mark.parametrize("left", [None, b"", b"0123"])
def test_a_note_that_is_none_is_as_if_there_were_none(tmp_path: Path, left: bytes | None) -> None:
    make_log(tmp_path)
    (tmp_path / LAST).unlink() if left is None else (tmp_path / LAST).write_bytes(left)
    check_log(tmp_path)


def test_a_rewritten_log_is_noted_anew(tmp_path: Path) -> None:
    lines = [line.rstrip(b"\n") for line in make_log(tmp_path)]
    rewrite_log(tmp_path, lines[1:])
    check_log(tmp_path)
    assert [event["iteration"] for _, event in scan_events(tmp_path, "trial")] == [1, 2, 3]


def test_an_edited_config_is_named_by_its_fields(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "run.json", {"format": FORMAT, "config": {"seed": 0}})
    (run / "config.yaml").write_text("seed: 0\nworkers: 2\n")
    assert read_config_values(run) == {"seed": 0, "workers": 2}
    (run / "config.yaml").write_text("seed: 1\n")
    told = r"^run 'run' cannot be read: its config\.yaml is not what the run was begun with \(seed\)$"
    with pytest.raises(DamagedFile, match=told):
        read_config_values(run)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", r"run\.json is damaged: it is not JSON; put it back as it was, or make the run again with --config "),
        ("[]", r"run\.json is damaged: it is not a JSON object; "),
        ('{"thread_id": "1"}', r"^run 'run' is of another version of Billhook; begin it again$"),
        (None, r"run\.json is missing: "),
    ],
)
def test_what_a_run_says_of_itself_is_checked(tmp_path: Path, content: str | None, told: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "run.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_made(run)
