"""Rows are made once, and written after each."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from graph.ablation import experiment, graph_arms, tables
from graph.ablation.experiment import ablate
from graph.ablation.rows import Ablation, Row
from graph.ablation.settings import AblateSettings
from tests.team import gather_teams
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.workbench.bench import Workbench


def make_settings(model: Path | str, out: Path, **changes: Any) -> AblateSettings:
    tiny = tiny_settings(model).model_dump() | {"out": str(out), "evaluated_tokens": 800}
    return AblateSettings.model_validate(tiny | {"arms": "kappa,random,search", "seeds": "0,1"} | changes)


def test_rows_are_made_once_and_written(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tiny_llama, tmp_path / "out")
    profiled: list[int] = []
    profile = Workbench.profile

    def count(bench: Workbench, *arguments: Any) -> str:
        profiled.append(bench.settings.seed)
        return profile(bench, *arguments)

    monkeypatch.setattr(Workbench, "profile", count)
    known = ablate(settings, [], Console(quiet=True))
    assert profiled == [0, 1], "once for each seed"
    assert [(row.arm, row.seed) for row in known.rows] == [
        (arm, seed) for seed in (0, 1) for arm in ("kappa", "random", "search")
    ]
    for row in known.rows:
        assert row.sparsity == pytest.approx(0.45, abs=5e-4)
        assert row.evaluated_tokens <= 800
    assert [row.trials for row in known.rows[:2]] == [1, 4]
    assert known.dense_perplexity is not None and known.dense_perplexity > 1
    stored = json.loads((tmp_path / "out" / "ablate.json").read_text())
    assert [row["perplexity"] for row in stored["rows"]] == [row.perplexity for row in known.rows]
    with (tmp_path / "out" / "ablate.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [row.arm for row in known.rows]
    text = (tmp_path / "out" / "ablate.md").read_text()
    assert "| kappa | 2 | " in text and "## Differences, paired by seed" in text
    assert {path.name for path in (tmp_path / "out").glob("ablate.*")} == {
        f"ablate.{kind}" for kind in ("csv", "json", "md", "png", "svg")
    }

    def refuse(*_arguments: Any) -> Row:
        raise AssertionError("a row is made again")

    monkeypatch.setattr(experiment, "_make_row", refuse)
    assert ablate(settings, [], Console(quiet=True)).rows == known.rows
    with pytest.raises(UserError, match=r"holds an ablation with other settings \(target_sparsity\); choose another"):
        ablate(settings.model_copy(update={"target_sparsity": 0.5}), [], Console(quiet=True))


def test_rows_of_an_earlier_version_are_gone_on_with_by_its_windows(
    beginning_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_plot", lambda _known, _kind, _path: None)

    def run(out: str, **changes: Any) -> Ablation:
        named = make_settings(beginning_llama, tmp_path / out, arms="kappa").model_dump(exclude={"bos"})
        return ablate(AblateSettings.model_validate(named | changes), [], Console(quiet=True))

    new, never = run("new", seeds="0"), run("never", bos="never")
    before = "(test text, windows of 64, a beginning-of-sequence token before every window (not counted), fp32; dense: "
    assert new.protocol.bos and before in (tmp_path / "new" / "ablate.md").read_text()
    run("old", bos="never", seeds="0")
    values = json.loads((tmp_path / "old" / "ablate.json").read_text())
    del values["settings"]["bos"], values["protocol"]["bos"]
    (tmp_path / "old" / "ablate.json").write_text(json.dumps(values))
    old = run("old")
    assert [row.perplexity for row in old.rows] == [row.perplexity for row in never.rows]
    assert old.dense_perplexity == never.dense_perplexity != new.dense_perplexity and not old.protocol.bos


def test_random_plans_are_measured_side_by_side(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_plot", lambda _known, _kind, _path: None)
    few = {"arms": "random", "seeds": "0", "evaluated_tokens": 3 * 192}
    alone = ablate(make_settings(tiny_llama, tmp_path / "alone", **few), [], Console(quiet=True)).rows
    teams = gather_teams(monkeypatch)
    shared = ablate(make_settings(tiny_llama, tmp_path / "shared", workers="2", **few), [], Console(quiet=True)).rows
    assert [row.model_dump(exclude={"seconds"}) for row in shared] == [
        row.model_dump(exclude={"seconds"}) for row in alone
    ]
    assert [len(team.handed) for team in teams] == [2], "two at once, and the third is shared"


def test_runs_of_the_graph_have_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fail(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=1, stdout="", stderr="stopped")

    monkeypatch.setattr(graph_arms.subprocess, "run", fail)
    settings = make_settings("no-model", tmp_path, workers="3", worker_threads=2)
    run = tmp_path / "runs" / "heuristic-0"
    for _ in range(2):
        with pytest.raises(UserError, match=r"^heuristic, seed 0: stopped; the same command goes on from there$"):
            graph_arms.run_graph("heuristic", 0, settings, [], lambda *_: None)
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text("{}")
    assert {"--name", "--workers=3", "--worker-threads=2", "--no-memory"} <= set(commands[0])
    assert commands[1][3:] == [
        *("--runs-dir", str(tmp_path / "runs"), "--resume", "heuristic-0", "--workers=3", "--worker-threads=2"),
        "--no-partial",
    ]
