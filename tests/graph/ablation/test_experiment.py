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
from graph.ablation.rows import Row
from graph.ablation.settings import AblateSettings
from tests.rows import prose
from tests.team import gather_teams
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.base.files import write_json
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
        searched = "refit:evolution, 0 of 400 generations of 16 children, 0 tokens"
        assert (row.plan == searched) is (row.arm == "search"), "one takes 4,608 tokens"
    walk = 4 * 2 * 64
    kappa, random, search = known.rows[:3]
    assert (kappa.trials, kappa.evaluated_tokens) == (1, walk + 192), "what is left holds no other"
    assert kappa.plan == "45.0% refit:kappa"
    assert random.trials >= 1 and random.evaluated_tokens >= 192 * random.trials
    assert (search.trials, search.evaluated_tokens) == (0, 192)
    assert not list((tmp_path / "out").glob("seed-*/kappa")), "what an arm made goes with it"
    dense = [known.dense[seed] or 0.0 for seed in (0, 1)]
    assert min(dense) > 1 and dense[0] != dense[1], "the seeds have other texts"
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


def test_rows_counted_otherwise_are_refused_in_one_line(
    beginning_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_plot", lambda _known, _kind, _path: None)
    settings = make_settings(beginning_llama, tmp_path / "out", arms="kappa", seeds="0")
    known = ablate(settings, [], Console(quiet=True))
    before = "(test text, windows of 64, a beginning-of-sequence token before every window (not counted), fp32; dense: "
    assert known.protocol.bos and before in (tmp_path / "out" / "ablate.md").read_text()
    path = tmp_path / "out" / "ablate.json"
    values = json.loads(path.read_text())
    values["settings"]["counting"] = 0
    write_json(path, values)
    with pytest.raises(UserError, match=r"holds an ablation with other settings \(counting\); choose another --out$"):
        ablate(settings, [], Console(quiet=True))


def test_texts_too_short_for_a_seed_are_refused_before_anything_is_pruned(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None
) -> None:
    (tmp_path / "short.txt").write_text(prose(0, 200))
    settings = make_settings(tiny_llama, tmp_path / "out", test=f"file:{tmp_path / 'short.txt'}", seeds="9,0")
    with pytest.raises(UserError, match=r"^seed 9: text source 'file:.*short\.txt' is too short: 2 test windows "):
        ablate(settings, [], Console(quiet=True))
    assert not (tmp_path / "out" / "seed-0").exists()


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
    assert [len(team.handed) for team in teams] == [0, 2], "the profile's; and two at once, then the third is shared"


def test_runs_of_the_graph_have_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fail(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=1, stdout="", stderr="stopped")

    monkeypatch.setattr(graph_arms.subprocess, "run", fail)
    settings = make_settings("no-model", tmp_path, workers="3", worker_threads=2, seconds=60)
    run = tmp_path / "runs" / "heuristic-2"
    for _ in range(2):
        with pytest.raises(UserError, match=r"^heuristic, seed 2: stopped; the same command goes on from there$"):
            graph_arms.run_graph("heuristic", settings.for_seed(2), [], lambda *_: None)
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"^chat-bare, seed 2: stopped; "):
        graph_arms.run_graph("chat-bare", settings.for_seed(2), ["--planner-fallback=heuristic"], lambda *_: None)
    assert {"--seed=2", "--text-cut=2", "--max-evaluated-tokens=800", "--max-seconds=60.0"} <= set(commands[0])
    assert commands[2][-3:] == ["--planner-fallback=heuristic", "--planner-fallback=none", "--planner-unaided"]
    assert {"--name", "--workers=3", "--worker-threads=2", "--no-memory"} <= set(commands[0])
    resumed = [*commands[0]]
    resumed[resumed.index("--name")] = "--resume"
    assert commands[1] == resumed, "which refuses what is not what it was begun with"
    said = "error: run 'heuristic-2' cannot be resumed with a changed config (tau); start a new run"
    refused = SimpleNamespace(returncode=2, stdout="", stderr=said)
    monkeypatch.setattr(graph_arms.subprocess, "run", lambda *_, **__: refused)
    (run / "summary.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"^heuristic, seed 2: run 'heuristic-2' .*; start a new run; or choose another"
    ):
        graph_arms.run_graph("heuristic", settings.for_seed(2), [], lambda *_: None)


def test_what_no_run_may_be_is_refused_before_anything_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_llama, tmp_path / "out", polish_tokens=128, device="stream")
    with pytest.raises(UserError, match=r"^polish_tokens: a polish holds all survivors .* and cannot be streamed; "):
        ablate(settings, [], Console(quiet=True))
