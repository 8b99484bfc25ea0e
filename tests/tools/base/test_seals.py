"""Seals: what was changed since it was written is noticed, and what an earlier version wrote is taken as it is."""

import json
from pathlib import Path

import pytest

from tools import report
from tools.base.made import read_config_values, read_result
from tools.base.rundir import (
    LAST,
    append_event,
    check_log,
    check_logged,
    read_last_seal,
    rewrite_log,
    scan_events,
)
from tools.base.seals import BrokenSeal, read_sealed, seal_lines, split_line, write_sealed

VALUE = {"b": [1.5, None], "a": {"2": "é", "10": 1e-300}}


def test_every_flip_in_a_sealed_file_leaves_the_content_or_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, VALUE, "me")
    assert read_sealed(path, "me", "") == VALUE
    whole, noticed = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = read_sealed(path, "me", "")
        except BrokenSeal as error:
            noticed += "\n" not in str(error)
            continue
        assert {name: found[name] for name in VALUE} == VALUE, "only the name of the seal, or white space"
    assert noticed > 3 * len(whole) // 4


def test_a_sealed_file_is_its_owners(tmp_path: Path) -> None:
    write_sealed(tmp_path / "x.json", VALUE, "me")
    with pytest.raises(BrokenSeal, match=r"^\S+x\.json is damaged, or another's: its content .* seal; do this$"):
        read_sealed(tmp_path / "x.json", "you", "do this")
    (tmp_path / "old.json").write_text(json.dumps(VALUE))
    assert read_sealed(tmp_path / "old.json", "you", "") == VALUE


def make_run(directory: Path, mark: str = "a1") -> Path:
    directory.mkdir()
    write_sealed(directory / "run.json", {"mark": mark, "log": mark, "config": {"seed": 0}}, "run.json")
    for number in range(4):
        append_event(directory, {"type": "trial", "iteration": number, "kl": 0.125})
    return directory


def list_trials(run: Path) -> list[int]:
    return [event["iteration"] for _, event in scan_events(run, "trial")]


def test_every_flip_in_a_log_is_noticed_or_seen_by_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log, last = run / "events.jsonl", read_last_seal(run)
    whole = log.read_bytes()
    for at in range(len(whole)):
        log.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(BrokenSeal, match=r"is damaged: it does not match its seal; put it back as it was, or "):
            scan_events(run, "trial")
    for end in range(1, len(whole) - 1):
        log.write_bytes(whole[:end])
        assert list_trials(run) == list(range(whole[: end + 1].count(b"\n"))), "as after a crash"
        with pytest.raises(BrokenSeal, match=r"what was written last is missing"):
            check_logged(run, last)


def test_lines_left_out_moved_or_of_another_run_are_noticed(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", "b2")
    log = run / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for number, wrong in (
        (2, [lines[0], *lines[2:]]),
        (1, [lines[1], lines[0], *lines[2:]]),
        (1, (other / "events.jsonl").read_bytes().splitlines(keepends=True)),
        (5, [*lines, b'{"type": "trial", "iteration": 9}\n']),
        (1, [b"no log at all\n"]),
    ):
        log.write_bytes(b"".join(wrong))
        with pytest.raises(BrokenSeal, match=rf"^line {number} of "):
            scan_events(run, "trial")


def test_a_line_that_a_crash_cut_short_is_vouched_for_by_the_next(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log = run / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    append_event(run, {"type": "trial", "iteration": 3})
    assert list_trials(run) == [0, 1, 2, 3]
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:3], lines[3].replace(b"0.125", b"0.625"), *lines[4:]]))
    with pytest.raises(BrokenSeal, match=r"^line 4 of "):
        scan_events(run, "trial")


def test_the_log_of_an_earlier_version_is_read_and_gone_on_with(tmp_path: Path) -> None:
    lines = [
        b'{"time": 1.0, "type": "trial", "iteration": 0}',
        b"torn",
        b'{"time": 1.0, "type": "trial", "iteration": 1}',
    ]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    append_event(tmp_path, {"type": "trial", "iteration": 2})
    assert list_trials(tmp_path) == [0, 1, 2]
    renewed = seal_lines((tmp_path / "events.jsonl").read_bytes().splitlines()[2:], "")
    assert [json.loads(split_line(line)[0])["iteration"] for line in renewed.splitlines()] == [1, 2]


def test_a_result_vouches_for_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_sealed(run / "summary.json", {"kl": 0.125, "log": read_last_seal(run)}, "a1")
    check_log(run)
    log = run / "events.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(BrokenSeal, match=r"events\.jsonl is damaged: what was written last is missing; "):
        check_log(run)
    (run / "run.json").unlink()
    with pytest.raises(BrokenSeal, match=r"summary\.json is damaged, or another's"):
        read_result(run)


def test_an_unfinished_log_that_was_cut_at_the_end_of_a_line_is_noticed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log = run / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        log.write_bytes(b"".join(lines[:kept]))
        with pytest.raises(BrokenSeal, match=r"^\S+events\.jsonl is damaged: what was written last is missing; "):
            check_log(run)
    log.write_bytes(b"".join(lines))
    check_log(run)


@pytest.mark.parametrize("left", [None, b"", b"0123", b"z" * 16, b"0123456789abcdef\n"])
def test_a_note_of_the_last_line_that_is_none_is_as_if_there_were_none(tmp_path: Path, left: bytes | None) -> None:
    run = make_run(tmp_path / "run")
    (run / LAST).unlink() if left is None else (run / LAST).write_bytes(left)
    check_log(run)
    append_event(run, {"type": "trial", "iteration": 4})
    assert (run / LAST).read_bytes() == read_last_seal(run).encode()


def test_a_kill_between_a_line_and_its_note_leaves_a_whole_log(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    earlier = (run / LAST).read_bytes()
    append_event(run, {"type": "trial", "iteration": 4})
    (run / LAST).write_bytes(earlier)
    check_log(run)


def test_a_rewritten_log_is_noted_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rewrite_log(run, (run / "events.jsonl").read_bytes().splitlines()[1:])
    check_log(run)
    assert list_trials(run) == [1, 2, 3]
    assert (run / LAST).read_bytes() == read_last_seal(run).encode()


def test_no_page_is_made_of_a_log_that_was_cut_or_without_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)

    def refuse() -> str:
        assert report.main(["run"]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1
        return told.err

    assert refuse().startswith("error: config file run/config.yaml does not exist; ")
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes()[:-30])
    assert refuse().startswith("error: run/events.jsonl is cut short: what was written last is missing; ")


def test_an_edited_config_is_named_by_its_fields(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("seed: 0\nworkers: 2\n")
    assert read_config_values(run) == {"seed": 0, "workers": 2}
    (run / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(
        BrokenSeal, match=r"^run 'run' cannot be read: its config\.yaml is not what the run was begun with \(seed\)$"
    ):
        read_config_values(run)
