"""The command: where a page goes, and what is no run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.made_runs import begin_run, make_layers, write_run
from tools.report import main
from tools.results.page.page import write_page


def test_one_run_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILLHOOK_RUNS_DIR", raising=False)
    assert main(["demo"]) == 0
    assert capsys.readouterr().out == "runs/demo/report.html\n"
    assert (run / "report.html").read_text(encoding="utf-8") == write_page([run])


def test_several_runs_go_into_the_file_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "first"), begin_run(tmp_path / "second", make_layers())
    out = tmp_path / "both.html"
    assert main([str(first), str(second), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text(encoding="utf-8") == write_page([first, second])


def test_bad_input_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILLHOOK_RUNS_DIR", raising=False)
    run, empty = write_run(tmp_path / "demo"), tmp_path / "empty"
    empty.mkdir()

    def refuse(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1
        return told.err.removeprefix("error: ").rstrip("\n")

    assert refuse("nothing") == "there is no run 'nothing', neither as a directory nor in runs"
    assert refuse("empty") == "empty holds no run: it has none of events.jsonl, config.yaml, summary.json"
    assert refuse("demo", "demo") == "several runs need --out FILE for their page"
    assert refuse("demo", "--out", "empty") == "empty cannot be written: Is a directory"
    assert refuse() == "the following arguments are required: RUN"
    profile = next((run / "artifacts").rglob("*.json"))
    profile.write_text("{}")
    damaged = f"artifact {profile.relative_to(tmp_path)} is damaged: its content does not match its hash"
    assert refuse("demo") == f"the profile of demo cannot be read: {damaged}"
    (run / "summary.json").write_text("{")
    assert refuse("demo").startswith("demo/summary.json is damaged: it is not JSON; ")


def test_it_starts_without_torch() -> None:
    code = "import sys, tools.report; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
